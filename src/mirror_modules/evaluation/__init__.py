"""Evaluation of trained runs: metrics, attribute accuracy, ablations and the HTML report."""

from mirror_modules.evaluation.ablation import ablate
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.evaluation.report import write_report

__all__ = ["ablate", "evaluate", "write_report"]
