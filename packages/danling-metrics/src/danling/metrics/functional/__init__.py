"""Metrics by name.

A name with a task, such as `multiclass_f1_score`, builds a descriptor for a container. A bare name, such as `accuracy`,
computes the value of one pair of predictions and targets at once.

`average="micro"` accuracy is the plain share of correct rows; the default, `"macro"`, is the mean over classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .counts import mcc
from .descriptor import MetricFunc
from .names import constructors
from .oneshot import ONE_SHOT
from .scores import ndcg, perplexity

__all__ = [
    "MetricFunc",
    "accuracy",
    "auprc",
    "auroc",
    "balanced_accuracy",
    "binary_accuracy",
    "binary_auprc",
    "binary_auroc",
    "binary_balanced_accuracy",
    "binary_calibration_error",
    "binary_cohen_kappa",
    "binary_f1",
    "binary_f1_score",
    "binary_fbeta",
    "binary_fbeta_score",
    "binary_hamming_loss",
    "binary_iou",
    "binary_jaccard_index",
    "binary_log_loss",
    "binary_precision",
    "binary_recall",
    "binary_specificity",
    "calibration_error",
    "cohen_kappa",
    "exact_match",
    "explained_variance",
    "f1_score",
    "fbeta_score",
    "hamming_loss",
    "iou",
    "jaccard_index",
    "kendall",
    "log_loss",
    "mae",
    "mape",
    "mcc",
    "mse",
    "multiclass_accuracy",
    "multiclass_auprc",
    "multiclass_auroc",
    "multiclass_balanced_accuracy",
    "multiclass_calibration_error",
    "multiclass_cohen_kappa",
    "multiclass_exact_match",
    "multiclass_f1_score",
    "multiclass_fbeta_score",
    "multiclass_hamming_loss",
    "multiclass_iou",
    "multiclass_jaccard_index",
    "multiclass_log_loss",
    "multiclass_precision",
    "multiclass_recall",
    "multiclass_specificity",
    "multiclass_top_k_accuracy",
    "multilabel_accuracy",
    "multilabel_auprc",
    "multilabel_auroc",
    "multilabel_balanced_accuracy",
    "multilabel_exact_match",
    "multilabel_f1_score",
    "multilabel_fbeta_score",
    "multilabel_hamming_loss",
    "multilabel_iou",
    "multilabel_jaccard_index",
    "multilabel_log_loss",
    "multilabel_precision",
    "multilabel_recall",
    "multilabel_specificity",
    "ndcg",
    "pearson",
    "perplexity",
    "precision",
    "r2_score",
    "recall",
    "rmse",
    "spearman",
    "specificity",
    "top_k_accuracy",
]

globals().update(constructors(__name__), **ONE_SHOT)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
