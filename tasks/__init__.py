"""
What can be measured: one protocol a file, each of which ends with its record, or with one for each set that it is run
on. Adding a task is a file, and a line here. See engine/task.py.
"""

from tasks import (
    canopy,
    captions,
    correspondence,
    depth,
    detection,
    discovery,
    dollarstreet,
    geobench,
    keypoints,
    knn,
    linear,
    logreg,
    met,
    openvocab,
    panoptic,
    retrieval,
    segmentation,
    tracking,
    vggt,
    video,
    voc07,
    zeroshot,
)

TASKS = {task.name: task for task in (
    knn.TASK,
    linear.TASK,
    logreg.TASK,
    voc07.TASK,
    dollarstreet.TASK,
    retrieval.TASK,
    met.TASK,
    *segmentation.TASKS,
    panoptic.TASK,
    *depth.TASKS,
    canopy.TASK,
    *geobench.TASKS,
    *detection.TASKS,
    discovery.TASK,
    *tracking.TASKS,
    *keypoints.TASKS,
    *correspondence.TASKS,
    vggt.TASK,
    *video.TASKS,
    zeroshot.TASK,
    captions.TASK,
    openvocab.TASK,
)}
