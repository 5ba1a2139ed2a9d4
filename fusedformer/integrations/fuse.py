"""fuse(model) puts our kernels into a model, in place; unfuse(model) takes them out again.

A module that is fused stays the same object with the same parameters, buffers, children and names;
its class alone changes, to a subclass. So state_dicts, optimizers, references held elsewhere,
deepcopy and pickle keep working.
"""

import dis
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import Dropout, Module

from fusedformer.integrations.layers import Fused, TransformerEncoder
from fusedformer.integrations.rules import RULES, Rule
from fusedformer.kernels import dispatch


class Entry(NamedTuple):
    """One line of a report."""

    name: str  # the module's, as named_modules() has it
    kind: str  # its class
    why: str  # what is fused, or why it was left


@dataclass
class FuseReport:
    """What fuse() did; print it."""

    fused: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "nothing fused: the model has no module that fuse() knows"
        lines = []
        for title, entries in (("fused", self.fused), ("left", self.left)):
            lines.append(f"{title}: {len(entries)}")
            groups: dict[tuple[str, str, str], int] = defaultdict(int)
            for name, kind, why in entries:
                # layers.0.norm and layers.1.norm are one line.
                groups[kind, why, re.sub(r"\b\d+\b", "*", name) or "(model)"] += 1
            width = max((len(kind) for kind, _, _ in groups), default=0)
            for (kind, why, name), count in groups.items():
                lines.append(f"{count:5}  {kind:{width}}  {name}: {why}")
        return "\n".join(lines)


def fuse(model: Module) -> FuseReport:
    """Has the modules of a model that it knows run on our kernels.

    It knows torch.nn's LayerNorm, RMSNorm, Dropout, MultiheadAttention, CrossEntropyLoss,
    TransformerEncoderLayer and TransformerDecoderLayer; in Hugging Face transformers the attention
    of every model that can switch it, the dropout + residual + layer norm of BERT and its kin, RMS
    norms as Llama and T5 have them, and GPT-2's GELU. Outputs and gradients change by rounding
    alone, dropout by its random numbers.

    A module is left as it is where it has hooks, parametrizations or another forward, is of a
    subclass, has options that the kernels do not have, or lies on a device without them; the
    report says which and why, and names the norms and attentions of classes that it does not know.
    Calls of torch's attention function are what sdpa() is for.

    Global hooks (torch.nn.modules.module.register_module_forward_hook and its like) see the modules
    that are called: of a layer that is fused not the norms and dropouts whose work it does.

    Args:
        model: changed in place. Fuse before compiling or sharding it, on the device where it will
            run (a model on the meta device counts as on one that can).

    Returns:
        The report.

    Raises:
        TypeError: model is not a module.
        ValueError: it is fused already, or compiled, scripted, wrapped or sharded; it is then
            unchanged.
    """
    _check(model)
    report = FuseReport()
    swaps: list[tuple[Module, type]] = []
    devices = [parameter.device for parameter in model.parameters()]
    default = devices[0] if devices else torch.get_default_device()
    models = list(_pretrained_models(model))
    # Ids of modules that are part of another's fusion.
    done = {
        id(dropout)
        for _, pretrained in models
        if _reason_to_leave_attention(pretrained, default) is None
        for dropout in _dropouts_of_attention(pretrained)
    }
    switchable = {id(part) for _, pretrained in models for part in pretrained.modules()}
    for name, module in model.named_modules():
        if id(module) in done:
            continue
        rule, kind = _rule(module), type(module).__name__
        if rule is None:
            reason = _unknown(module, id(module) in switchable)
        else:
            reason = _reason_to_leave(module, rule, default)
        if reason is not None:
            report.left.append(Entry(name, kind, reason))
        if rule is None or reason is not None:
            continue
        report.fused.append(Entry(name, kind, rule.what))
        swaps.append((module, rule.fused))
        parts = [getattr(module, part) for part in rule.parts]
        done |= {id(part) for part in parts}
        # A dropout may be called by itself even so, beside an activation that is not known.
        swaps += [(part, RULES[Dropout].fused) for part in parts if isinstance(part, Dropout)]
    for name, pretrained in models:
        _fuse_attention(name, pretrained, default, report)
    fused_ids = {id(module) for module, _ in swaps}
    for name, module in model.named_modules():
        if type(module) is not torch.nn.TransformerEncoder or not module.use_nested_tensor:
            continue
        if any(id(layer) in fused_ids for layer in module.layers):
            report.fused.append(Entry(name, "TransformerEncoder", "no nested tensors"))
            swaps.append((module, TransformerEncoder))
    for module, fused in swaps:
        module.__class__ = fused
    return report


def unfuse(model: Module) -> None:
    """Gives every module that fuse() changed its class back, and models their attention.

    Raises:
        TypeError: model is not a module.
        ValueError: nothing in it is fused, or it is sharded.
    """
    if not isinstance(model, Module):
        raise TypeError(f"unfuse: model must be a torch.nn.Module; got {type(model).__name__}")
    fused: list[Any] = [module for module in model.modules() if isinstance(module, Fused)]
    switched: list[Any] = [module for module in model.modules() if _ATTENTION in module.__dict__]
    if not fused and not switched:
        raise ValueError("unfuse: nothing in the model is fused; fuse(model) does that")
    for module in fused:
        if "original" not in vars(type(module)):
            raise ValueError(
                f"unfuse: {type(module).__name__} has got another class since it was fused, as "
                "sharding gives; unfuse before that"
            )
    for module in fused:
        module.__class__ = module.original
    for module in switched:
        before = module.__dict__.pop(_ATTENTION).before
        if before is not None:
            module.set_attn_implementation(before)


# --- What keeps a model from being fused ----------------------------------------------------------

# By name, so that nothing is imported for it.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"}


def _check(model: Module) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module; got {type(model).__name__}")
    for name, module in model.named_modules():
        what = f"its part {name}" if name else "the model"
        bases = {base.__name__ for base in type(module).__mro__}
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"fuse: {what} is scripted; fuse the model it was made of")
        if "OptimizedModule" in bases or module._compiled_call_impl is not None:
            raise ValueError(
                f"fuse: {what} is compiled; fuse the model it was made of, then compile that"
            )
        if bases & _WRAPPERS:
            raise ValueError(
                f"fuse: {what} is wrapped in {(bases & _WRAPPERS).pop()}; fuse the model, then wrap"
            )
        sharded = any(hasattr(parameter, "placements") for parameter in module._parameters.values())
        if "FSDPModule" in bases or sharded:
            raise ValueError(f"fuse: {what} is sharded; fuse the model, then shard it")
        if isinstance(module, Fused) or _ATTENTION in module.__dict__:
            raise ValueError(f"fuse: {what} is fused already; to fuse anew, unfuse(model) first")


# --- What keeps a module from being fused ---------------------------------------------------------


def _rule(module: Module) -> "Rule | None":
    """Of its class, or of torch's class that it is a subclass of; None for any other module."""
    kind: Any = type(module)
    if kind in RULES:
        return RULES[kind]
    if kind.__module__.startswith("fusedformer."):
        return None
    if kind.__module__.startswith("transformers."):
        from fusedformer.integrations.hf_layers import rule_for

        if (rule := rule_for(kind)) is not None:
            return rule
    return next((rule for base, rule in RULES.items() if isinstance(module, base)), None)


def _unknown(module: Module, switchable: bool) -> "str | None":
    """Why a module is left that is unknown, but a norm or attention by name; None for others."""
    kind = type(module)
    if kind.__module__.startswith(("fusedformer.", "torch.nn.utils.")):
        return None
    reason = f"a class that is not known, {kind.__module__}.{kind.__qualname__}"
    # What holds others, which have a line of their own, has none.
    if "norm" in kind.__name__.lower() and not any(module.children()):
        return reason
    attentions = [part for part in module.modules() if _ATTENTIVE.search(type(part).__name__)]
    if attentions != [module] or switchable:  # a model of transformers has one line for all
        return None
    if kind.__module__.startswith("transformers."):
        return "without its model, whose attention is switched as a whole"
    return f"{reason}; sdpa() is for its calls of torch's attention function"


_ATTENTIVE = re.compile("attn|attention", re.IGNORECASE)


def _reason_to_leave(module: Module, rule: Rule, default: torch.device) -> "str | None":
    kind = type(module)
    if not issubclass(rule.fused, kind):
        return f"a class of its own, {kind.__module__}.{kind.__qualname__}"
    if (reason := _changed(module)) is not None:
        return reason
    for name, wanted in rule.parts.items():
        part = getattr(module, name)
        found: Any = type(part)
        if found is not wanted:
            return f"its {name} is a {found.__name__}"
        if (reason := _changed(part)) is not None:
            return f"its {name} has {reason}"
    parameters = list(module.parameters())
    device = parameters[0].device if parameters else default
    dtype = parameters[0].dtype if parameters else torch.float32
    if (reason := rule.refuse(module, device)) is not None:
        return reason
    return None if device.type == "meta" else dispatch.why_not_fused(rule.op, device, dtype)


def _changed(module: Module) -> "str | None":
    """What was done to this one module that its class does not say."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
        module._backward_pre_hooks,
    )  # fmt: skip
    if any(hooks):
        return "hooks"
    if "forward" in module.__dict__:
        return "a forward of its own"
    return None


# --- Attention of transformers --------------------------------------------------------------------

_ATTENTION = "_fusedformer_attention"  # where a module keeps that it was switched


def _pretrained_models(model: Module) -> Iterator[tuple[str, Any]]:
    """The models of transformers within, those inside others left out."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer) for outer in found)
        if isinstance(module, transformers.PreTrainedModel) and not inside:
            found.append(f"{name}." if name else "")
            yield name, module


def _dropouts_of_attention(model: Any) -> Iterator[Dropout]:
    """Those that are never called once its attention is switched, as their p alone is read."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is Dropout and _reads_p_alone(type(module).forward, name):
                yield child


def _reads_p_alone(forward: Any, name: str) -> bool:
    """Whether all that a forward does with its self.<name> is to read self.<name>.p."""
    code = getattr(inspect.unwrap(forward), "__code__", None)  # none where it is no function
    names = [step.argval for step in dis.get_instructions(code)] if code else []
    after = [names[at + 1] for at, found in enumerate(names[:-1]) if found == name]
    return bool(after) and set(after) == {"p"}


def _fuse_attention(name: str, model: Any, default: torch.device, report: FuseReport) -> None:
    from fusedformer.integrations import hf

    before = model.config._attn_implementation
    kind = type(model).__name__
    reason = _reason_to_leave_attention(model, default)
    if reason is not None:
        report.left.append(Entry(name, kind, f"attention: {reason}"))
        return
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    kept = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    hf.register()
    model.set_attn_implementation(hf.NAME)
    # All that read a config, so that each of them can be pickled without the model.
    for part in model.modules():
        if "config" in part.__dict__:
            part.__dict__[_ATTENTION] = hf.Switched()
    model.__dict__[_ATTENTION] = hf.Switched({"": before} | kept)
    report.fused.append(Entry(name, kind, f"attention (was {before})"))


def _reason_to_leave_attention(model: Any, default: torch.device) -> "str | None":
    if model.config._attn_implementation == "fusedformer":
        return "it runs on our kernels already"
    if not model._can_set_attn_implementation():
        return "transformers cannot switch it in this model"
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its scores are capped (attn_logit_softcapping)"
    if any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters()):
        return "it has attention sinks"
    if model.config.output_attentions:
        return "it returns the attention weights (output_attentions)"
    meta = default.type == "meta"
    return None if meta else dispatch.why_not_fused("attention", default, model.dtype)
