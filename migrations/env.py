"""Alembic's entry: runs revisions on the connection that `migrations.upgrade` hands over. Opens none of its own."""

from __future__ import annotations

from alembic import context

from app.db.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
# `migrations.upgrade` holds the transaction; this one nests in it.
with context.begin_transaction():
    context.run_migrations()
