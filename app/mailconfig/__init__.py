"""The configuration of the mail programs: settings in, text out.

SECURITY: loaded by the worker (root), which writes what these functions return. Nothing here touches a file of the host
or starts a process, and nothing but a value checked by `hosts.py` or `app.addresses` reaches a template.
"""
