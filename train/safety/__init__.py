"""What may go wrong with a run, and what is done about it, a file each.

recovery     what a step that went wrong leads to: mended, undone, left out, the end
preemption   asked to stop           watchdog   a rank that stops          spikes   a loss that jumps
replicas     copies that differ      failures   what a rank leaves behind  lock     two jobs in one folder
"""
