"""The operators inside other libraries' models. Nothing here is imported with `unept`, and none of them is required."""
