"""The tables, and the views on them.

SECURITY: loaded by the worker (root). Declarations only.
"""

from sqlmodel import SQLModel

from app.models.columns import METADATA_NAMES

# It must be in place before the first table is declared, so it stands here.
SQLModel.metadata.naming_convention = METADATA_NAMES
