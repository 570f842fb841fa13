"""
What the commands stand on, and nobody types.

    config          the command line              ranks          processes, devices, precision, cores
    checkpoint      what a run leaves             shards         tensors in files, by rows
    saver           written while steps run       legacy         checkpoints of before, read without trust
    interrupt       signals, failures, NaN        plan           what a step needs and costs
    progress        what a run says               groups, cache  of distillation: who trains what; the teacher's words
    layouts         names in weight files         task           what a task of evaluate.py declares
    features        frozen features               chunks         the same on disk, by many ranks
    views, sliding  what a network sees           classify       what classifications share
    match           the most similar points       metrics        every score
    pictures        what --out draws              attention, explore    one row of the matrix; a page of similarities
    timing          stopwatch of CPU and GPU      report         rows, tables, goals
    opponents       what the ops stand beside     versus         the ops: right, how fast
    trials          the trainer on a GPU          inference      a frozen backbone's speed, beside others
"""
