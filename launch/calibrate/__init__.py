"""`weft calibrate`: measure this machine, and write what it can do as a cluster sheet that `weft simulate` reads.

Small models of weft's own layers run here, and every operator that runs in them is timed (`operators`); processes send
each other what ranks do (`communication`); the optimizer moves parameters (`optimizer`). Curves are fitted to these
times (`fitting`) and written with their residuals (`document`). No step of any recipe is timed: those are what a sheet
is judged by.
"""
