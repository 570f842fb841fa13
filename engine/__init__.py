"""
What the commands stand on, and nobody types.

    config          the command line              ranks          processes, devices, precision, cores
    checkpoint      what a run leaves             shards         tensors in files, by rows
    interrupt       signals, failures, NaN        legacy         checkpoints of before, read without trust
    progress        what a run says               groups, cache  of distillation: who trains what; the teacher's words
    layouts         names in weight files         chunks         features on disk
    features        frozen features               metrics        every score
    attention       one row of the matrix         explore        a page to explore similarity in
"""
