"""One file per revision, in order; each says what it does to the schema."""
