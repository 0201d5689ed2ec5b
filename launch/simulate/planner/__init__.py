"""The search for a better plan.

`layouts` lists what may be chosen, `layers` makes stages quickly, `plan` prices and ranks.
"""
