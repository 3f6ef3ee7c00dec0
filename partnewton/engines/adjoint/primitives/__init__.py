"""The rules of the engine, one file for each kind of operation."""
