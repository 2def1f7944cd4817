"""The operators inside other libraries' models. `unept` imports nothing of it, and requires none of these libraries."""
