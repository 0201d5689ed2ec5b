"""What a machine can do: `sheet` reads one, `fit` makes curves of measurements."""
