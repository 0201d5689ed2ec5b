"""The time of a step.

`engine` runs the program, each instruction a `race` of compute against exchanges over a `card`; `update` is what comes
after. `skew` makes ranks unlike, `everyone` lets none stand for another, `cores` are what ranks on a CPU share.
"""
