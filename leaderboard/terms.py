"""Titles and meanings of metrics, reasons, states, flags and pictures."""

from __future__ import annotations

LABELS = {
    "c_acc": "C-Acc",
    "asr": "ASR",
    "r_acc": "R-Acc",
    "c_acc_attacked": "C-Acc before",
    "asr_attacked": "ASR before",
    "o_asr": "O-ASR",
    "p_asr": "P-ASR",
    "p_asr_net": "P-ASR net",
    "p_asr_ra": "P-ASR (RA)",
    "p_asr_qra": "P-ASR (QRA)",
    "c_acc_ra": "C-Acc (RA)",
    "asr_wba": "ASR (WBA)",
    "asr_bba": "ASR (BBA)",
    "asr_tba": "ASR (TBA)",
    "bba_queries": "Queries of BBA",
    "r_acc_wba": "R-Acc (WBA)",
    "r_acc_guaa": "R-Acc (gUAA)",
    "wba_moved": "Way of WBA's perturbation",
    "p_asr_qra_net": "P-ASR (QRA) net",
    "asr_noise": "ASR under noise",
    "cka": "CKA to the attacked model",
    "cka_triggers": "CKA of triggers",
    "asr_wake": "ASR by retuning effort",
    "wake_cost": "Wake cost",
    "wake_cost_rel": "Wake cost, relative",
    "asr_accident": "ASR by accident",
    "asr_accident_rise": "Rise by accident",
    "c_acc_accident": "C-Acc after accidents",
    "bec": "BEC",
    "bec_layerwise": "BEC, layers' own ratios",
    "bec_debiased": "BEC, debiased",
    "shift_target": "Target shift",
    "shift_target_clean": "Target shift of clean models",
    "shift_target_net": "Target shift net",
    "c_asr_qra": "C-ASR (QRA)",
    "asr_guaa": "ASR (gUAA)",
    "r_acc_bba": "R-Acc (BBA)",
    "r_acc_tba": "R-Acc (TBA)",
    "lmc_bd_auc": "ASR on the straight path",
    "lmc_t20": "Last point above 20 % ASR",
    "lmc_barrier_clean": "Barrier of clean error",
    "lmc_barrier_bd": "Barrier of backdoor error",
    "tac": "TAC of chosen channels",
    "tac_agreement": "Agreement of TAC's kinds",
    "tac_contrast": "TAC of the top channels",
    "reasr": "REASR",
    "reasr_clean": "REASR clean",
    "apd": "APD",
    "apd_rel": "APD rel.",
    "excl": "Excl",
    "excl_last": "Excl, last change",
    "excl_eligible": "Excl, images that count",
    "bound": "Largest change that works",
    "der": "DER",
    "p_der": "P-DER",
    "reasr_net": "REASR net",
    "reasr_any": "REASR, any label",
    "reasr_before": "REASR before repair",
    "reasr_after": "REASR after repair",
    "reasr_repaired": "REASR, sought anew",
    "reasr_repaired_clean": "REASR clean, sought anew",
    "flag_repaired": "Flagged after repair",
    "apd_raw": "APD of masks",
    "mask_iou": "Mask IoU",
    "rir": "RIR",
    "asr_source": "ASR, images meant",
    "asr_leak": "ASR leak",
    "cover_acc": "Cover accuracy",
    "cover_asr": "Cover ASR",
    "c_acc_path": "C-Acc (candidates)",
    "asr_path": "ASR (candidates)",
    "c_acc_oracle": "C-Acc (oracle-selected)",
    "asr_oracle": "ASR (oracle-selected)",
    "ra_k": "RA budget",
    "p_asr_clean": "P-ASR of clean models",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "linf": "Largest pixel change",
    "silhouette": "Silhouette",
    "det_score": "Score",
    "det_flag": "Flagged",
    "det_acc": "Detection accuracy",
    "det_bacc": "Balanced accuracy",
    "det_tpr": "Model TPR",
    "det_fpr": "Model FPR",
    "cost_forwards": "Images forward",
    "cost_backwards": "Images backward",
    "cost_queries": "Images asked about",
    "det_auroc": "Model AUROC",
    "det_tpr_fpr5": "Model TPR at 5 % FPR",
    "det_fpr_fpr5": "Model FPR at 5 % FPR",
    "det_missing": "Backdoored models without verdict",
    "det_missing_clean": "Clean models without verdict",
    "label_acc": "Label accuracy",
    "label_tpr": "Label TPR",
    "label_fpr": "Label FPR",
    "pair_acc": "Pair accuracy",
    "pair_tpr": "Pair TPR",
    "pair_fpr": "Pair FPR",
    "input_auroc": "Input AUROC",
    "input_tpr_fpr1": "TPR at 1 % FPR",
    "input_tpr_fpr5": "TPR at 5 % FPR",
    "input_tpr": "Input TPR",
    "input_fpr": "Input FPR",
    "input_acc": "Input accuracy",
    "evidence": "Pictures shown",
    "verdict": "Verdict",
}

HIGHER = frozenset({"c_acc", "r_acc", "c_acc_ra", "reasr", "der", "p_der"})
"""Columns of cells in which a larger figure is better for the defender."""
LOWER = frozenset(
    {"asr", "o_asr", "p_asr", "p_asr_net", "p_asr_ra", "p_asr_qra", "asr_wba", "asr_bba", "asr_tba", "bec"}
    | {"apd", "apd_rel"}
)
"""Columns of cells in which a smaller figure is better for the defender. BEC is said to rank nothing elsewhere."""

BETTER = {
    **dict.fromkeys(HIGHER, "Higher is better for the defender."),
    **dict.fromkeys(LOWER - {"bec"}, "Lower is better for the defender."),
}

READING = {
    "reasr_net": "REASR minus REASR clean of the same cell: success of the recovered trigger that a model without the "
    "backdoor does not give it too. Primary figure of trigger inversion; below 0 the trigger works better on clean "
    "models. A recovered trigger that works everywhere is a natural weakness of the data, not the backdoor.",
    "reasr": "It counts only beside REASR clean: any model can be fooled by a large enough pattern.",
    "reasr_clean": "What the same trigger does to models that never had the backdoor.",
    "reasr_after": "Held against REASR before repair: the same triggers, those that the repair was made with. Low says "
    "that these triggers are gone, not that no other one would be found.",
    "reasr_repaired": "The method searches the repaired model again. It counts only beside the clean figure.",
    "reasr_repaired_clean": "What the triggers found in the repaired model do to models that never had a backdoor.",
    "flag_repaired": "A mean over cells is the share of repaired models that the method still calls backdoored.",
    "apd_rel": "1 is the distance of an empty answer, which changes no pixel.",
    "mask_iou": "1 is the true place, 0 another one. Empty for triggers that differ from image to image.",
    "shift_target_net": "0 is what the trigger does to models that never had a backdoor, 1 the whole way to the target "
    "class further. It needs no attacked model, so models trained anew have one; whether what sleeps wakes it does not "
    "say, and it ranks nothing.",
    "shift_target": "0: the trigger moves the features nowhere towards the target class; 1: the whole way.",
    "shift_target_clean": "What the same trigger does to independent clean models, each in its own features.",
    "bec": "From CKA to the attacked model on triggered images, in the channels that the trigger excites most: 1 where "
    "the defended model answers there as the attacked one, 0 where it is as like it as a clean model. It follows "
    "closeness of the weights, so it is read beside its controls and ranks nothing.",
    "bec_layerwise": "Read as BEC; a layer in which clean models are near the attacked one weighs as much as others.",
    "bec_debiased": "Read as BEC; few images raise the plain estimator of CKA, not this one.",
    "cka": "1 where two models' activations on the same images agree. Models of one task are alike without any "
    "backdoor: BEC holds it against clean models.",
    "tac": "1: these channels change with the trigger no more than the others.",
    "tac_contrast": "1: all channels of a layer change alike under the trigger; large: a few carry it.",
    "tac_agreement": "100 %: both ways to compute TAC choose the same channels.",
    "excl": "100 %: only the attacker's very trigger works; 0 %: any trigger of its family does. It is of the "
    "undefended model, over the images on which the trigger works. Compare an attack with its own variants.",
    "excl_last": "Never below Excl: of the last change that worked, as the released code prints, not the largest.",
    "excl_eligible": "Few images make Excl uncertain.",
    "bound": "In Euclidean norm, beside the largest change that the trigger's family admits (control=boundary).",
    "lmc_bd_auc": "High: the backdoor is there on most of the straight path from the weights before repair to these.",
    "lmc_t20": "100 %: the defended model itself still answers; low: a small step of the repair is enough.",
    "lmc_barrier_clean": "Near 0: clean accuracy holds all along the path, so both models lie in one basin.",
    "lmc_barrier_bd": "Near 0: nowhere on the path is the backdoor weaker than at its two ends on average.",
    "asr_source": "Of an attack that spares classes or images: success on those that the trigger is meant for.",
    "p_asr_qra_net": "What QRA gets from this backdoor beyond what it gets where this backdoor is not.",
    "asr_guaa": "WBA's control: what it reaches needs no trigger, and so is an adversarial perturbation.",
    "r_acc_wba": "With ASR it adds up to at most 1; the rest goes to other wrong classes.",
    "r_acc_guaa": "With ASR it adds up to at most 1; the rest goes to other wrong classes.",
    "wba_moved": "Near 0: gradients were too small to move the perturbation, so a low ASR says little.",
    "c_asr_qra": "What the perturbation does without the trigger is an attack and no re-activation.",
    "r_acc_bba": "With ASR it adds up to at most 1; the rest goes to other wrong classes.",
    "r_acc_tba": "With ASR it adds up to at most 1; the rest goes to other wrong classes.",
    "asr_leak": "Of a source-specific attack: how far its trigger works on classes that it is meant to spare. "
    "High means that the attack is less specific than its name says.",
    "cover_acc": "Cover images carry the trigger, or part of it, and keep their label.",
    "cover_asr": "Cover images that get the label the attacker wants all the same.",
    "c_acc_path": "One row per candidate that the defense chose among, by its qualifier.",
    "asr_path": "One row per candidate that the defense chose among, by its qualifier.",
    "c_acc_oracle": "The candidate was chosen on the test set: to compare with published tables, never ranked.",
    "asr_oracle": "The candidate was chosen on the test set: to compare with published tables, never ranked.",
    "silhouette": "From -1 to 1: near 1 triggered and clean images lie apart inside the model, near 0 they overlap.",
    "det_score": "Scores of two detectors have no common scale.",
    "det_flag": "The detector's threshold is fixed before it sees the model.",
    "cost_forwards": "What the defense took, however fast the machine: an epoch over 1,000 rows is 1,000 images.",
    "cost_backwards": "A method that takes no gradients has none.",
    "cost_queries": "Images that a method without access to the weights had answered.",
    "det_auroc": "Primary figure of model detection. 50 % is guessing. The bounds are a 95 % score interval over "
    "models, and wide where models are few.",
    "det_tpr": "At the threshold that the detector fixed beforehand.",
    "det_fpr": "At the threshold that the detector fixed beforehand. Clean models are those of attack none.",
    "det_tpr_fpr5": "At a threshold from clean models of other seeds, whatever the detector's own.",
    "det_fpr_fpr5": "What is left of the 5 % on clean models that set no threshold.",
    "det_missing": "They count in no other figure over models; in the ranking a failure scores 50 %.",
    "det_missing_clean": "They count in no other figure over models.",
    "det_bacc": "Not swayed by how many models of either kind there are.",
    "det_acc": "Depends on how many models of either kind there are; balanced accuracy does not.",
    "label_tpr": "Whether the detector names the attacker's label, at the threshold of its verdict.",
    "label_fpr": "Labels that no triggered image is meant to get, and that the detector names all the same.",
    "pair_acc": "A detector that names no pair is right on most of them: read it with Pair TPR.",
    "pair_tpr": "Whether the detector names the source classes of the attack, each with its target.",
    "pair_fpr": "Pairs of classes that no trigger leads from the first to the second of.",
    "input_auroc": "50 % is guessing.",
    "input_tpr_fpr1": "Primary figure of input detection. A score that is the same for all inputs has 0 %.",
    "input_tpr_fpr5": "A score that is the same for all inputs has 0 %.",
    "input_tpr": "At the threshold that the detector fixed before it saw an input. Read it with Input FPR.",
    "input_fpr": "At the threshold that the detector fixed before it saw an input.",
    "input_acc": "At the threshold that the detector fixed before it saw an input. Never calling scores 50 %.",
}
"""How to read a metric, beside what it is."""

FRACTIONS = frozenset(
    {
        *("cover_acc", "reasr_net", "mask_iou", "label_tpr", "label_fpr", "pair_tpr", "pair_fpr"),
        *("input_auroc", "input_tpr_fpr1", "input_tpr_fpr5", "input_tpr", "input_fpr", "input_acc"),
    }
)
"""Fractions that no column of the tables has a unit for; an evaluator's own word goes before."""
NO_SHARES = frozenset({"linf"})
"""Fractions that are no share of anything, and so are printed as they are."""
SIGNED = frozenset({"reasr_net"})
"""Fractions that may lie below 0."""

REASONS = {
    "does_not_fit": "the attack as set cannot work on images or classes such as this data set's",
    "needs_bn": "the method needs batch normalisation, which this architecture lacks",
    "attack_controls_training": "the attack controls training and leaves no training set to hand over",
    "opaque_model": "the repaired model keeps private code, so its weights and activations cannot be read",
    "no_trigger_range": "the trigger has no defined range of admissible changes",
    "no_static_trigger": "the trigger differs from image to image, so there is no one pattern to compare with",
    "no_trigger": "the method recovered no trigger",
    "ra_not_successful": "the retuning attack did not wake the model, and this figure builds on it",
    "other_architecture": "the two models are of different architectures",
    "attack_did_not_implant": "the attack did not plant a working backdoor, so nothing can be said about a defense",
    "removed_channels": "the defense took out all channels that the figure looks at: there is nothing to compare",
    "unseen_change": "the defense changed the model behind the last layer that the figure looks at",
    "error_not_reached": "amplified batch normalisation makes the model wrong on too few clean rows",
    "not_purified": "O-ASR stays above 20 %: the backdoor is awake, so there is nothing to re-activate",
    "budget_of_other_tuning": "the number of retuning images was found with other steps or another rate than RA has",
    "no_valid_budget": "no number of retuning images leaves clean models asleep",
    "not_a_descendant": "the model does not descend from the attacked one",
    "input_failed": "a task that this one builds on failed",
    "control_missing": "a control that this figure is compared with has none",
    "no_verdict": "the method gives no verdict on the model",
    "no_label_scores": "the method gives no score per label",
    "no_pairs": "the method names no pairs of source and target",
    "no_scores": "the method gives no scores of inputs",
    "no_alarm": "the method has no threshold of its own for inputs",
    "no_evidence": "the method shows no curves or pictures of its own",
    "no_inversion": "the method recovers no triggers",
    "no_repair": "the method repairs no model with recovered triggers",
    "none_right": "the model classifies none of these images correctly without a trigger",
    "no_claim": "the method recovers triggers, but claims none for this label",
    "no_mask": "the recovered trigger is a change of the image without a mask",
    "needs_stamp": "a recovered trigger has neither mask nor change that could be put on images",
    "no_marks": "the method marks no training rows",
    "no_candidates": "the method chose among no candidates",
    "no_candidate_keeps_accuracy": "every candidate loses more accuracy than the rule allows",
    "no_such_rows": "the attack spares no class, or has no cover images",
    "no_other_class": "every class is a target, so none could be named wrongly",
    "no_other_pair": "every pair of classes is one of source and target, so none could be named wrongly",
    "no_surrogates": "the suite names no model to transfer from, or none that may be used",
    "same_model": "the surrogate is the model itself",
    "never_reached": "no effort that was tried reaches half of the images",
    "control_never_reached": "no effort that was tried wakes the control, so there is nothing to compare with",
    "control_awake": "the control answers to the trigger without any effort",
    "no_placebo": "no trigger of the same family could be made that does nothing",
    "model_unchanged": "the method judges and leaves the model as it is, so there is nothing to wake",
    "too_few_clean_models": "a threshold is validated on half of the clean models, and there are too few",
    "one_class": "only backdoored or only clean models have a verdict, and a figure over both needs both",
    "pooled": "measured over all attacks together",
    "unchanged": "the trigger changes no pixel",
    "too_few_classes": "the method looks for an outlier among classes, and there are too few",
    "too_few_clean_rows": "the method needs more clean rows than it got",
    "too_few_rows": "a group has fewer than two rows",
    "needs_linear_head": "the method reads features before a linear head, which this architecture lacks",
    "withheld": "the submitter keeps the figure back, so it counts as a failure",
    "filtered": "left out by the run's own selection",
    "budget": "left out: the run's budget was spent",
    "raised": "the method raised an error",
    "nan": "the result was not a finite number",
    "wrong_shape": "the method returned something of the wrong shape",
    "undeclared_access": "the method asked for something that it had not declared",
}

OF_SOURCE = {
    "not_purified": "the model that the qualifier names answers to more than 20 % of triggered images, so it is no "
    "surrogate to transfer from",
}
"""Meanings of reasons in rows whose qualifier names another model, as `source=`: they are about that one."""

STATUS_WORDS = {
    "ok": "measured",
    "not_applicable": "not applicable",
    "failed": "failed",
    "timeout": "ran out of time",
    "out_of_memory": "ran out of memory",
    "not_run": "not run",
}

FLAG_WORDS = {
    "weak": "the attack did not reach the implant gate",
    "tuned": "a setting of this row was found by trying; its suite says which",
    "collapsed": "the defense ruined the model: means take the worse of its own and the undefended model's figure",
    "snapshot": "trained with control of the batches; the training set that this defense got stands in for it",
    "reduced": "less than the method's default effort: fewer images, steps or draws, or smaller networks",
    "stale": "measured with an earlier version of the method",
    "nondeterministic": "a repeat may differ in the last digits",
    "judges": "the method answers about the model and leaves it as it is: C-Acc and ASR are the undefended model's",
    "not_purified": "O-ASR stays above 20 %, so P-ASR enters no mean of woken models",
}

PICTURES = {
    "gallery": (
        "Trigger gallery",
        "One row per test image: clean, with the trigger, and the difference, enlarged around mid-grey.",
    ),
    "gallery_training": (
        "Trigger gallery, as poisoned in training",
        "One row per training image that the attack poisoned: clean, as poisoned, and the difference, enlarged around "
        "mid-grey. Where training itself poisons it may be a row that stands for these, or a probe image, which no "
        "model was trained on; before version 4 of stealth it is a probe image for every attack.",
    ),
    "recovered": (
        "True and recovered triggers",
        "One row per test image: clean; with the true trigger, where there is one; with the recovered one; the "
        "difference of these two, enlarged around mid-grey; and the recovered mask, white where it covers, or change.",
    ),
}
"""Title and caption of the pictures that evaluators name so."""

FACTS = {
    "residual_factor": "the difference in the picture is multiplied by this",
    "refused": "what the defense gave in another form than the one that is drawn, and what it lacks",
}
"""Meanings of what evaluators record beside their figures."""
