"""HTTP, one file per resource: who, where, one call, one view. No rules and no SQL."""
