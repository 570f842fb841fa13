"""
What the commands stand on, and nobody types.

    config          the command line              ranks          processes, devices, precision
    checkpoint      what a run leaves             groups, cache  of distillation: who trains what; the teacher's words
    layouts         names in weight files         chunks         features on disk
    features        frozen features               metrics        every score
    attention       one row of the matrix         explore        a page to explore similarity in
    timing          stopwatch of CPU and GPU      report         rows, tables, goals
    opponents       what the ops stand beside     versus         the ops: right, how fast
    trials          the trainer on a GPU
"""
