"""The service: HTTP, rules, database and storage. Knows no tensor: importing it never imports torch."""
