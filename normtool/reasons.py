"""Verdicts and reason codes: one word per idea, stable, explained by `normtool explain CODE`."""

from collections.abc import Mapping
from dataclasses import dataclass

APPROXIMATED = "approximated"
FOLDED = "folded"
KEPT = "kept"
LOWERED = "lowered"
RESTORED = "restored"
SWAPPED = "swapped"


@dataclass(frozen=True)
class Reason:
    """Why a site was left alone. `where` names the op or tensor that stands in the way."""

    code: str
    message: str
    where: str = ""

    def __post_init__(self) -> None:
        if self.code not in EXPLANATIONS:
            raise ValueError(f"unknown reason code {self.code!r}; add it to reasons.EXPLANATIONS")

    def to_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "where": self.where}


#: code → (what it means, what to do about it)
EXPLANATIONS: Mapping[str, tuple[str, str]] = {
    # ---- verdicts
    "folded": (
        "The norm is gone; its scale and shift now live in the constants of the ops named under `into`. Where "
        "only the scale could move, the shift is the constant of an Add in the norm's place. A norm that "
        "computes its statistics at run time stays, and has lost what `moved` names (`--affine`): γ is 1, "
        "β is 0 or absent.",
        "Nothing. `proof` in the JSON report says how it was checked.",
    ),
    "lowered": (
        "The norm could not be folded, and has become other ops, as `--lower` asked: Mul and Add, a depthwise "
        "1×1 Conv, or an Add whose scale went through a ReLU.",
        "Nothing. Without `--lower` it is kept, and ONNX Runtime runs a BatchNorm faster than Mul + Add.",
    ),
    "restored": (
        "The norm is back where a fold had taken it out.",
        "Nothing.",
    ),
    "swapped": (
        "The LayerNorm is an RMSNorm now, with the same ε; the ops named under `into` write their "
        "output without its "
        "mean, or have taken γ and β. `centring` says how many Centre ops were put in (`free`: none).",
        "Nothing. Reasons beside it say why its β has stayed as an Add.",
    ),
    "approximated": (
        "The LayerNorm is an RMSNorm now, though nothing takes the mean out of what it reads: it no longer "
        "computes the same. `drift` says by how much (relative L2, of the norm without β): predicted from ρ, "
        "the mean of its input over its standard deviation, and measured.",
        "Look at the largest drift, and at what the outputs moved by; `--except` keeps a norm, `--calibrate "
        "FILE.npz` fits its γ and β to data. docs/approximate.md has the formula.",
    ),
    "kept": (
        "The norm is exactly where it was, or, with `partly_folded`, smaller and before a Concat. Every reason "
        "is listed beside it.",
        "Look up the reason codes with `normtool explain CODE`.",
    ),
    # ---- the norm itself
    "training_mode": (
        "The BatchNorm runs in training mode: it uses the statistics of each batch, not stored ones.",
        "Export the model again in inference mode (model.eval() before export).",
    ),
    "no_running_stats": (
        "The norm stores no mean and variance, so its output is not a fixed affine map of its input.",
        "Nothing to fold. Track running statistics during training if a foldable norm is wanted.",
    ),
    "data_dependent": (
        "The norm computes its statistics from its input at run time (LayerNorm, GroupNorm, "
        "InstanceNorm, RMSNorm, …), so it is not an affine map and cannot be folded away.",
        "Nothing to fold. Only BatchNorm in inference has fixed statistics. `--affine` moves γ and β, where it "
        "has any.",
    ),
    "degenerate_stats": (
        "γ/√(σ²+ε) is not finite: a variance is negative or NaN, or σ²+ε is 0.",
        "Repair the statistics in the source model; a fold would write infinities.",
    ),
    "malformed": (
        "The norm, or an op on the way, contradicts itself: attributes of the wrong type or length, operands "
        "that do not fit each other.",
        "ONNX Runtime will most likely refuse the model too; export it again.",
    ),
    # ---- constants
    "dynamic_weight": (
        "A weight, scale or statistic that would have to change is computed at run time.",
        "Simplify the model first if that computation is really constant.",
    ),
    "overridable": (
        "A stored value is also a graph input, so a caller may replace it at run time.",
        "`--freeze` treats such values as constants and takes them off the input list.",
    ),
    "quantised": (
        "A weight or bias is stored as integers with a scale, and to change it would mean to quantise it again "
        "(a scale of its own for each channel changes without).",
        "Fold BatchNorm before quantising the model.",
    ),
    "shared_parameter": (
        "The stored value is used by several ops and cannot be replaced for one of them alone; or it is the "
        "table of an embedding too (a tied head), which would have to be stored twice.",
        "Give each op its own copy in the source model.",
    ),
    "range_overflow": (
        "A folded coefficient is too large, or a whole filter too small, for the dtype of its weight.",
        "Fold at float32 and convert afterwards, or keep this norm.",
    ),
    # ---- the way to the absorber
    "multiple_readers": (
        "A tensor on the way is read by another op too, which would see the folded values.",
        "Nothing can be done exactly, unless the other reader is removed.",
    ),
    "graph_output": (
        "A tensor on the way is an output of the model, so its values must stay.",
        "Drop that output if nobody needs it.",
    ),
    "captured": (
        "A tensor on the way is read from inside the body of an If, Loop or Scan.",
        "Nothing can be done exactly while the body reads the unfolded values.",
    ),
    "no_producer": (
        "The norm reads a model input (or a constant), so no op in front of it can take its scale and shift.",
        "Normalise the input outside the model, or keep the norm.",
    ),
    "nonlinear": (
        "A nonlinear op stands between the norm and the nearest op with weights.",
        "A scale and shift pass it in neither direction; the norm stays.",
    ),
    "unsupported_op": (
        "An op in front of the norm, or behind it, has no exact rule here (yet), or is unknown.",
        "See docs/adding-a-rule.md if the algebra allows one.",
    ),
    "axis_unknown": (
        "The rank of a tensor is unknown, so a constant cannot be told to lie along the channel axis.",
        "Run ONNX shape inference, or export with shapes.",
    ),
    "axis_mismatch": (
        "The axis the norm scales is not an axis of the weights it would have to go into.",
        "Nothing: equal sizes do not make equal axes.",
    ),
    "padded_shift": (
        "An op on the way pads with a constant (or counts its padding), which the norm's shift does not reach: "
        "inside it would be right, at the border wrong.",
        "The scale can still move, and one Add stays. `--border-maps` puts the exact shift of every position "
        "into a constant, where the height and width are fixed.",
    ),
    "negative_scale": (
        "A channel's scale is negative, and an op on the way (MaxPool, ReLU) passes only positive ones.",
        "Nothing can be done exactly.",
    ),
    "no_bias": (
        "An op on the way could take the scale, but has no place for the shift.",
        "Nothing: the scale moves, and the shift stays as an Add, wherever that is possible.",
    ),
    "partly_folded": (
        "The norm stood behind a Concat. All inputs of that but one took in their share of its scale and shift "
        "(`into` names them); on the channels of that one alone a smaller norm stays, before the Concat. The "
        "reasons beside it say why that one could not.",
        "Nothing: the function is the same, with fewer parameters and less to compute.",
    ),
    "not_selected": (
        "The norm is not among those that `--only` and `--except` choose.",
        "Change the patterns to fold it.",
    ),
    "not_called": (
        "The model holds this norm as a module, and its forward never calls it (on the example inputs).",
        "Nothing to fold; an unused module can be deleted.",
    ),
    "no_module": (
        "The fold is exact, but the user's module has no place for it: its own code makes the call, or holds "
        "the weight in a form that cannot be set.",
        "Fold the exported program (.pt2) instead: there every op can be changed.",
    ),
    "hook": (
        "A hook on a module sees the tensor between the norm and what would absorb it.",
        "Remove the hook first, or fold the exported program (.pt2).",
    ),
    # ---- LayerNorm → RMSNorm
    "not_layer_norm": (
        "Only LayerNorms become RMSNorms.",
        "Nothing.",
    ),
    "observed_mean": (
        "Something reads the mean of what the LayerNorm normalises, so that mean cannot be left "
        "out where it is "
        "written: an op that is no LayerNorm over the same axis, or an output of the model.",
        "If it is an output that nobody needs, name the others with `--outputs`; `--mode centre` "
        "puts Centre ops in.",
    ),
    "not_centrable": (
        "What writes the LayerNorm's input has no constants that could take the mean out: a "
        "nonlinearity, a depthwise "
        "Conv, another norm's γ, a model input.",
        "`--mode centre` puts a Centre op (ReduceMean, Sub) behind it.",
    ),
    "no_centre_gain": (
        "The swap would need more than one Centre op for every two LayerNorms, and so cost more than it gains.",
        "`--mode centre` does it all the same.",
    ),
    "scaled": (
        "A constant per channel (a layer scale) stands between the LayerNorm and the weights, and "
        "could not be taken "
        "into them.",
        "See the reasons that stand beside it.",
    ),
    "second_moment_differs": (
        "The LayerNorm's denominator is not √(mean((x − mean)²) + ε): an RMSNorm computes something else.",
        "Nothing: the two differ.",
    ),
    "not_measured": (
        "Nothing could be learnt of what the LayerNorm reads, so nobody knows how far it would drift without "
        "its mean: it lies in the body of an If, Loop or Scan, or the data has no finite row for it.",
        "Give other data with `--calibrate FILE.npz`, or keep the norm.",
    ),
    "not_fitted": (
        "There are too few rows to fit γ and β to: the norm keeps its own.",
        "Give more samples.",
    ),
    "flat_rows": (
        "Some rows that the LayerNorm reads are one number all along (padding, most often). It makes 0 of "
        "them, and β is left; an RMSNorm makes ±1. No γ and β can mend both, so they take no part in a fit.",
        "Where something masks those rows afterwards, nothing; else keep the norm with `--except`.",
    ),
    # ---- what ONNX Runtime makes of norms (lints)
    "bfloat16_on_cpu": (
        "ONNX Runtime's CPU provider has RMSNormalization in float16, float32 and float64, not in bfloat16.",
        "`--target primitive` spells it out, with its statistics in float32.",
    ),
    "group_norm_inlined": (
        "ONNX Runtime's CPU provider has no kernel for GroupNormalization and writes it out at loading.",
        "Export at an opset below 18: there it is spelled with InstanceNormalization, which has one.",
    ),
    "unfused_reciprocal": (
        "The norm is spelled with a Reciprocal, which ONNX Runtime's fusions do not know; it runs 2 to 5 times "
        "slower than the spelling with a Div.",
        "`swap` writes the spelling that is fused.",
    ),
    "unfused_axes": (
        "The norm is spelled out over axes that are not the last one, and stays so in ONNX Runtime.",
        "Nothing here; moving the channels last would let it be fused.",
    ),
    "skip_layer_norm": (
        "ONNX Runtime takes a residual Add and the norm behind it into one SkipLayerNormalization (or its "
        "RMSNorm sibling), which on CPU is several times slower than the two.",
        "Set the session option optimization.disable_specified_optimizers=SkipLayerNormFusion, and measure.",
    ),
    # ---- what the reader notices (diagnostics)
    "checker": (
        "The ONNX checker rejects the model as it was read. ONNX Runtime may still accept it.",
        "Nothing, if the model runs; else export it again.",
    ),
    "not_sorted": (
        "The nodes are not in topological order, as the standard demands. ONNX Runtime sorts them itself.",
        "Nothing, if the model runs.",
    ),
    "shape_inference": (
        "ONNX could not infer the shapes inside the model, so some ranks may be unknown.",
        "Look for `axis_unknown` among the reasons; export with shapes if it is there.",
    ),
    "defined_twice": (
        "Two Constant nodes give the same tensor.",
        "Nothing, if both store the same.",
    ),
    "unknown_op": (
        "An operator that neither the standard nor ONNX Runtime defines. Nothing is known of what it does.",
        "Nothing for scan; fold treats it as an obstacle, and validate needs a runtime that knows it.",
    ),
    "unrecognised_norm": (
        "An unknown operator or function whose name sounds like a norm. It is not counted as one.",
        "Look at it by hand: names lie in both directions.",
    ),
    "newer_opset": (
        "The model uses an opset that is newer than the installed onnx package.",
        "Upgrade onnx; operators may have changed their meaning.",
    ),
    # ---- what the reader of a checkpoint notices
    "roles_by_name": (
        "A state dict does not say which tensors are learnable. Running statistics and integers are counted as "
        "buffers, every other tensor as learnable, frozen ones and float buffers among them.",
        "Give the model itself if it matters: a .pt2, or a Python factory with --weights.",
    ),
    "norms_by_name": (
        "Norms without running statistics leave no trace in a checkpoint but names and shapes. These are "
        "guesses, marked with `evidence: name`; BatchNorms are certain (`evidence: statistics`).",
        "Give the model itself to be sure; `normtool scan -v` lists which ones were guessed.",
    ),
    "not_counted": (
        "The checkpoint holds other tensors beside the model's: an optimizer's state, averaged weights, a "
        "second model. The largest state dict is counted, averages only if there is nothing else.",
        "Save the state dict that you mean in a file of its own if another one was meant.",
    ),
    "expanded_view": (
        "A tensor is an expanded or overlapping view: its shape claims more elements than its storage holds. "
        "What is stored is counted.",
        "Nothing. Save the tensor after `.clone()` if it is meant to be stored whole.",
    ),
    "no_data": (
        "A tensor was saved from the meta device: the file gives its shape and none of its numbers.",
        "Load the weights before saving.",
    ),
    "compressed_records": (
        "The archive was compressed after PyTorch wrote it. The sizes counted are those it says to unpack to.",
        "Nothing; PyTorch can read it too, but not memory-map it.",
    ),
    "not_in_index": (
        "A shard holds tensors that the index of the shards does not list. They are counted, "
        "as a loader of the shards would load them.",
        "Nothing, or write the index again.",
    ),
    "uninitialised": (
        "A lazy module's parameters exist and have no size before its first forward. They are in no count.",
        "Run the module once on real input, then scan it.",
    ),
    # ---- conversion
    "folded_by_exporter": (
        "torch.onnx.export folded this BatchNorm itself, at its default. normtool has no proof of it; the "
        "validation of the whole model covers it.",
        "Nothing, if the validation is `equal`; `convert --fold` folds it with a proof before the export.",
    ),
    "not_asked": (
        "The model was converted as it is.",
        "`convert --fold` folds what can be folded exactly.",
    ),
    # ---- whole-model reasons
    "no_dataflow": (
        "Nothing is known of what reads what: only weights were given, or no example inputs, or torch.export "
        "refuses the model (the message is its own). Without the graph nothing can be moved.",
        "Give the model itself (ONNX, .pt2 or a Python factory) and, to a PyTorch module, example inputs.",
    ),
    "internal": (
        "A rewrite that should have been exact failed its own proof and was not made.",
        "This is a bug in normtool: please report it with the model or its architecture.",
    ),
}
