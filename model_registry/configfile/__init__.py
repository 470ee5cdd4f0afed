"""Configuration files: YAML to values that remember their line, includes, and problems told where they stand."""
