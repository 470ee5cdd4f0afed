"""What a model is, what it weighs, and which slice profile it needs.

Import from the modules: some of them run in processes that have to stay small, and most of what is here needs pydantic.
"""
