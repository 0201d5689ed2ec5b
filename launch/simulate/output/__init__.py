"""What is shown of a simulated step: the `page`, the `trace`, and `published` figures to lay beside it."""
