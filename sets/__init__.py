"""
Data sets as people have them on disk: one form a file. Each is read and checked before any weights are loaded; what is
wrong with it is said in one line.

    pairs     images with a truth          labels, depths, boxes    pixels' classes, metres, objects
    classes   images of one class each     finegrained, variants    known sets; ImageNet's other test sets
    rankings  instances to rank            videos, clips            to track in, to classify
    scans, navi, things                    the same point, or part, in two images
    posed, rooms                           scenes whose cameras are known; generated ones
"""
