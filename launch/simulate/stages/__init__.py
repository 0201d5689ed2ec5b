"""What a stage costs and keeps.

`world` builds a recipe's stages in a fake world, `work` looks at their passes, `storage` at what is alive.
"""
