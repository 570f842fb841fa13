"""
Plants other constants in the protocols of tasks/, sets/, decoders/, engine/ and runs the tests that should see them.

    python tests/mutants_tasks.py [WORD...]     prints the table, or its rows that have one of the words; exit code 1 if
                                                one survives, or cannot be planted
"""

import contextlib
import importlib.util
import io
import os
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

MUTANTS = [  # module, what tests it, old text, which stands there once, and new texts
    ("tasks.tracking", "test_tracking", "CONTEXT = 7 ", "CONTEXT = 6 ", "CONTEXT = 8 "),
    ("tasks.tracking", "test_tracking", "RADIUS = 12 ", "RADIUS = 11 ", "RADIUS = 13 "),
    ("tasks.tracking", "test_tracking", "VOTERS = 5 ", "VOTERS = 4 ", "VOTERS = 6 "),
    ("tasks.tracking", "test_tracking", "TEMPERATURE = 0.2 ", "TEMPERATURE = 0.19 ", "TEMPERATURE = 0.21 "),
    ("tasks.correspondence", "test_correspondence", "MATCHES = 1000 ", "MATCHES = 999 ", "MATCHES = 1001 "),
    ("tasks.correspondence", "test_navi test_correspondence", "metres=(0.05, 0.1, 0.2)", "metres=(0.05, 0.1, 0.21)"),
    ("tasks.correspondence", "test_navi", "metres=(0.01, 0.02, 0.05)", "metres=(0.01, 0.03, 0.05)"),
    ("tasks.keypoints", "test_keypoints", "NEAR = 0.1 ", "NEAR = 0.098 ", "NEAR = 0.102 "),
    ("tasks.discovery", "test_discovery", "i / 20 for i in range(9)", "i / 20 for i in range(8)",
     "i / 20 for i in range(10)", "i / 19 for i in range(9)"),
    ("tasks.discovery", "test_discovery", "FAINT = 1e-5 ", "FAINT = 1.1e-5 ", "FAINT = 0.0 "),
    ("tasks.discovery", "test_discovery", "EXACT = 1e-9 ", "EXACT = 1e-2 "),
    ("tasks.discovery", "test_discovery", ".max() >= 0.5 for box in found", ".max() > 0.5 for box in found",
     ".max() >= 0.51 for box in found"),
    ("tasks.knn", "test_knn", "temperature=0.07", "temperature=0.075", "temperature=0.065"),
    ("tasks.knn", "test_knn", "ks=(10, 20, 100, 200)", "ks=(10, 20, 100, 201)", "ks=(10, 20, 100)"),
    ("tasks.linear", "test_linear", "MOMENTUM = 0.9", "MOMENTUM = 0.89", "MOMENTUM = 0.91"),
    ("tasks.linear", "test_linear", "SPREAD = 0.01 ", "SPREAD = 0.009 ", "SPREAD = 0.011 "),
    ("tasks.linear", "test_linear", "+ [0.1]", "+ [0.2]", ""),
    ("tasks.linear", "test_linear", "c.linear_batch / 256", "c.linear_batch / 255", "1"),
    ("tasks.logreg", "test_logreg", "held_out(y, 0.1, c.seed)", "held_out(y, 0.11, c.seed)", "held_out(y, 0.09, c.seed)"),
    ("engine.classify", "test_classify", "TRIES = 5 ", "TRIES = 4 ", "TRIES = 6 "),
    ("engine.classify", "test_classify", "SHARE = 0.01 ", "SHARE = 0.009 ", "SHARE = 0.011 "),
    ("engine.classify", "test_logreg", "10 ** np.linspace(-6, 5, 45)", "10 ** np.linspace(-5, 5, 45)",
     "10 ** np.linspace(-6, 6, 45)", "10 ** np.linspace(-6, 5, 44)"),
    ("tasks.met", "test_met", "NEIGHBOURS = 1, 2, 3, 5, 7, 10, 15, 20, 50 ", "NEIGHBOURS = 1, 2, 3, 5, 7, 10, 15, 20, 51 ",
     "NEIGHBOURS = 1, 2, 3, 5, 7, 11, 15, 20, 50 "),
    ("tasks.met", "test_met", "SHARPNESS = 0.01, 0.1,", "SHARPNESS = 0.1,", "SHARPNESS = 0.01, 0.2,"),
    ("tasks.met", "test_met", "WHITE = 512 ", "WHITE = 511 ", "WHITE = 513 "),
    ("tasks.met", "test_met", "values.max() * 1e-9", "values.max() * 1e-3"),
    ("tasks.voc07", "test_voc07", "RANDOM = 20 ", "RANDOM = 19 ", "RANDOM = 21 "),
    ("tasks.voc07", "test_voc07", "max(len(x) // 10, 1)", "max(len(x) // 11, 1)", "max(len(x) // 9, 1)"),
    ("tasks.depth", "test_depth", "BINS = 256", "BINS = 255", "BINS = 257"),
    ("tasks.depth", "test_depth", "logits.relu() + 0.1", "logits.relu() + 0.11"),
    ("tasks.depth", "test_depth", "0.15 * g.mean()", "0.16 * g.mean()"),
    ("decoders.linear", "test_linear_decoder", "BATCH = 16 ", "BATCH = 15 ", "BATCH = 17 "),
    ("decoders.linear", "test_linear_decoder", "FEW = 5000 ", "FEW = 4999 ", "FEW = 5001 "),
    ("decoders.linear", "test_linear_decoder", "lr=1e-3, weight_decay=1e-3", "lr=2e-3, weight_decay=1e-3",
     "lr=1e-3, weight_decay=2e-3", "lr=1e-3, weight_decay=0"),
    ("decoders.linear", "test_linear_decoder", "beta2=0.999,", "beta2=0.99,"),
    ("decoders.linear", "test_linear_decoder", "warmup=1500 / 40000", "warmup=1000 / 40000", "warmup=2000 / 40000"),
    ("decoders.linear", "test_linear_decoder", "clip=math.inf", "clip=35", "clip=1"),
    ("decoders.linear", "test_linear_decoder", "dropout=0.1)", "dropout=0.11)", "dropout=0)"),
    ("decoders.linear", "test_linear_decoder", "lr=3e-4, weight_decay=1e-4", "lr=2e-4, weight_decay=1e-4",
     "lr=3e-4, weight_decay=2e-4", "lr=3e-4, weight_decay=0"),
    ("decoders.linear", "test_linear_decoder", "beta2=0.99, ", "beta2=0.999, "),
    ("decoders.linear", "test_linear_decoder", "warmup=1 / 3", "warmup=1 / 2", "warmup=1 / 4"),
    ("decoders.linear", "test_linear_decoder", "clip=35)", "clip=34)", "clip=36)", "clip=35, dropout=0.1)"),
    ("decoders.linear", "test_linear_decoder", "(0.9, recipe.beta2)", "(0.8, recipe.beta2)"),
    ("decoders.linear", "test_linear_decoder", "std=0.01)", "std=0.02)"),
    ("decoders.linear", "test_linear_decoder", "side * 2 / 3", "side * 3 / 4"),
    ("sets.things", "test_things test_keypoints", "OF_CLASS = 200 ", "OF_CLASS = 199 ", "OF_CLASS = 201 "),
    ("sets.things", "test_things", "PAIRS = 60 ", "PAIRS = 59 ", "PAIRS = 61 "),
    ("sets.navi", "test_navi", "EVERY = 4 ", "EVERY = 3 ", "EVERY = 5 "),
    ("sets.navi", "test_navi", "TURN = 120 ", "TURN = 119 ", "TURN = 121 "),
    ("sets.navi", "test_navi", "INVERSE = 655.35 ", "INVERSE = 655.36 "),
    ("sets.navi", "test_navi", "if 0 < len(scenes) < len(files):", "if False:", "if len(scenes) < len(files):"),
    ("sets.depths", "test_depths", "crop=(352, 1216)", "crop=(352, 1215)", "crop=(351, 1216)"),
    ("sets.depths", "test_metrics_constants", "array.shape[-1] - width) // 2", "array.shape[-1] - width)"),
    ("sets.depths", "test_depths", "Depths(256, 80.0,", "Depths(255, 80.0,", "Depths(256, 81.0,"),
    ("sets.depths", "test_depths", "0.40810811, 0.99189189, 0.03594771", "0.41, 0.99189189, 0.03594771",
     "0.40810811, 0.99, 0.03594771", "0.40810811, 0.99189189, 0.03"),
    ("sets.depths", "test_depths", "NEAREST = 0.001 ", "NEAREST = 0.01 "),
    ("sets.depths", "test_depths", "SHALLOW = 1 / 500 ", "SHALLOW = 1 / 400 "),
    ("sets.depths", "test_depths", "FLAT = 14.0 ", "FLAT = 13.0 "),
    ("sets.variants", "test_variants", "BORDER = 2 ", "BORDER = 1 ", "BORDER = 3 "),
    ("sets.classes", "test_classes", "SHAPES = 2000, 500 ", "SHAPES = 2000, 400 ", "SHAPES = 1000, 500 "),
    ("sets.pairs", "test_pairs", "GENERATED = 400, 100 ", "GENERATED = 300, 100 ", "GENERATED = 400, 200 "),
    ("sets.videos", "test_videos", "VIDEOS = 20 ", "VIDEOS = 19 "),
    ("sets.labels", "test_labels", "IDS = 7, 8,", "IDS = 6, 8,"),
    ("engine.metrics", "test_metrics", "TOLERANCE = 0.008 ", "TOLERANCE = 0.007 ", "TOLERANCE = 0.009 "),
    ("engine.metrics", "test_metrics", "IGNORE = 255 ", "IGNORE = 254 "),
    ("engine.metrics", "test_metrics", 'hard=(("hard",), ("junk", "easy"))', 'hard=(("hard",), ("junk",))'),
    ("engine.metrics", "test_metrics_constants", "(69.528, ", "(69.628, "),
    ("engine.metrics", "test_metrics_constants", "57.294, 65.458", "65.458, 57.294"),
]


def survivor(module, tests, old, new):
    """None if the tests fail with this constant planted; else what was found."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    source = path.read_text()
    if source.count(old) != 1:
        return f"{path.name} has {old!r} {source.count(old)} times"
    pid = os.fork()
    if not pid:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            os._exit(tested(module, path, source.replace(old, new), tests))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {pytest.ExitCode.TESTS_FAILED: None, pytest.ExitCode.OK: "NOT CAUGHT"}.get(code, f"pytest ended with {code}")


def tested(name, path, source, tests):
    """pytest's exit code, with the module of that name made of this source."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    exec(compile(source, path, "exec"), module.__dict__)
    files = [str(ROOT / f"tests/{each}.py") for each in tests.split()]
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-m", "not long", "--rootdir", str(ROOT), *files]))


def main(words):
    rows = [(module, tests, old, new) for module, tests, old, *others in MUTANTS for new in others]
    rows = [row for row in rows if not words or any(word in part for word in words for part in row)]
    if not rows:
        print(f"mutants_tasks: no row has one of {words}", file=sys.stderr)
        return 2
    survivors = 0
    for module, tests, old, new in rows:
        start = time.perf_counter()
        wrong = survivor(module, tests, old, new)
        survivors += wrong is not None
        said = f"{time.perf_counter() - start:5.1f} s  {wrong or 'caught by ' + tests}"
        print(f"{module:20} {old.strip()!r:45} {new.strip()!r:45} {said}", flush=True)
    return survivors > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
