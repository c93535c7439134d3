from vgan.evaluation import evaluate as _e
from vgan.evaluation.evaluate import SMALLER_IS_BETTER, shown_values, write_nearest

__all__ = ["SMALLER_IS_BETTER", "make_evaluator", "shown_values", "write_nearest"]


def make_evaluator(dataset, device, features, metrics, n, repeats, seed, batch_size, holdout=0):
    return _e.make_evaluator(
        {
            "features": features,
            "metrics": metrics,
            "n": n,
            "repeats": repeats,
            "seed": seed,
            "batch_size": batch_size,
            "holdout": holdout,
        },
        dataset,
        device,
    )
