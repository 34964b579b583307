"""Evaluation of trained runs: metrics, attribute accuracy, ablations, the report."""

from mirror_modules.evaluation.ablation import Cell, ablate, ablation_cells
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.evaluation.report import Case, Showcase, write_report

__all__ = ["Case", "Cell", "Showcase", "ablate", "ablation_cells", "evaluate", "write_report"]
