"""Evaluation of trained runs: metrics, attribute accuracy, ablations, comparisons, the report."""

from mirror_modules.evaluation.ablation import Cell, ablate, ablation_cells
from mirror_modules.evaluation.comparison import compare
from mirror_modules.evaluation.evaluation import evaluate
from mirror_modules.evaluation.report import Case, Showcase, write_report
from mirror_modules.evaluation.study.making import Study, make_study
from mirror_modules.evaluation.study.results import study_results

__all__ = [
    "Case",
    "Cell",
    "Showcase",
    "Study",
    "ablate",
    "ablation_cells",
    "compare",
    "evaluate",
    "make_study",
    "study_results",
    "write_report",
]
