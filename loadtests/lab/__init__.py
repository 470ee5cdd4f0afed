"""The isolation lab: a victim, what is done to it, where it is done from, and a verdict."""
