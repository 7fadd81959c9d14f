"""The tables, and the views on them.

SECURITY: loaded by the worker (root). Declarations only.
"""

import importlib
import pkgutil

from sqlmodel import SQLModel

from app.models.columns import METADATA_NAMES

# It must be in place before the first table is declared, so it stands here.
SQLModel.metadata.naming_convention = METADATA_NAMES


def declare_all() -> None:
    """Declares every table, for whoever compares or makes the whole schema. The processes import only what they use."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
