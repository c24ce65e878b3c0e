"""What the engine is compared with: other projects' code, ported line by line in our words, and training as people do it.

Ports keep the steps, the types and the waste of their originals, and their mistakes too; where this machine or a newer
library forces a difference, the port says so.
"""
