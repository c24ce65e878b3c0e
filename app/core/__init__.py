"""The rules of the service: what is allowed next. No HTTP and no SQL text."""
