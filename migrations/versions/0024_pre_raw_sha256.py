"""Keep of a dataset the sha256 of the file that it was made of, for users to compare.

Revises: 0023
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One column; of datasets that are there the files are gone, and so nobody knows."""
    op.add_column("datasets", sa.Column("raw_sha256", sa.Text(), nullable=True))


def downgrade() -> None:
    """These sums are forgotten."""
    op.drop_column("datasets", "raw_sha256")
