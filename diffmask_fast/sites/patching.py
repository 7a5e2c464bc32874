"""Read, replace, stop at and resume from the hidden states of one model, and leave that model as it was.

What the published getter and setter do (De Cao et al., 2020), and two ways of running less of the model.
Hooks stand only while `Patched.run` runs.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .derive import hands_on, reads_pictures
from .entries import argument_name, emptied, entry, others, state_at, with_entry
from .registry import Site, expand, listing

Replacement = Tensor | Callable[[Tensor], Tensor]


class Run(NamedTuple):
    """What `Patched.run` returns: the model's output (None after `stop`) and the captured states, by site."""

    output: Any
    states: dict[int, Tensor]


def patch(model: nn.Module, part: str = "", rows: Iterable[tuple | Site] | None = None) -> Patched:
    """A handle by which the hidden states of `model` can be captured and replaced. Changes nothing by itself.

    Args:
        model: an eager module that has sites (see `sites_of`). Of a DDP or compiled wrapper, pass what is
            inside.
        part: dotted path of the submodule whose sites they are, as "decoder" (see `sites_of`). A run is always one
            of the whole model.
        rows: sites for this handle alone, as `register_sites` takes them, whatever is known of the class.

    Returns:
        The handle, also a context manager that removes itself. Several handles of one model may exist.

    Raises:
        TypeError, ValueError: not a module, or no sites are known for it; the message says what to register.

    Example:
        >>> with patch(model) as patched:
        ...     original, states = patched.run(inputs, capture=(0, 3))
        ...     masked, _ = patched.run(inputs, replace={0: z * states[0] + (1 - z) * baseline})
    """
    return Patched(model, part, rows)


class Patched:
    """The handle that `patch` returns. `sites` are the model's; a site's number is its place among them."""

    def __init__(self, model: nn.Module, part: str = "", rows: Iterable[tuple | Site] | None = None) -> None:
        expanded = expand(model, part, rows)
        self.sites: tuple[Site, ...] = tuple(site for site, _ in expanded)
        self._chain = [k for k, (_, in_chain) in enumerate(expanded) if in_chain]
        self._model: nn.Module | None = model
        self._not_taken: set[str] = set()
        if reads_pictures(model):  # which have no padding, and most models no argument for it
            self._not_taken = {"attention_mask"} - set(inspect.signature(model.forward).parameters)
        self._modules = [model.get_submodule(site.module) for site in self.sites]
        self._enclosing = _enclosing(model, self.sites)
        self._parts = [model.get_submodule(site.within) if site.within else None for site in self.sites]
        # An output in which the state is yet to be put, by `_kind`, where nothing else of it is needed. A layer gives
        # a tensor in transformers 5 and a tuple in 4, which is known once it has run.
        self._forms: dict[Any, Any] = {}

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def model(self) -> nn.Module:
        """The model itself, to look at; call it through `run`.

        Raises:
            RuntimeError: the handle was removed.
        """
        if self._model is None:
            raise RuntimeError("this handle was removed: call patch(model) for a new one")
        return self._model

    @property
    def layers(self) -> list[nn.Module]:
        """The modules of the chain whose states are sites, each once: what `resume` leaves out."""
        return list(dict.fromkeys(self._modules[k] for k in self._chain))

    def remove(self) -> None:
        """Let go of the model: the handle can't run any more. May be called again."""
        self._model, self._modules, self._enclosing, self._parts, self._forms = None, [], [], [], {}

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        capture: Iterable[int] = (),
        replace: Mapping[int, Replacement] | None = None,
        stop: int | None = None,
        resume: tuple[int, Tensor] | None = None,
        call: Callable[..., Any] | None = None,
    ) -> Run:
        """Call `model(**inputs)`, reading and changing states on the way.

        Until this returns, the model must not be called in another way: such a call would meet the same
        hooks.

        Args:
            inputs: keyword arguments of the model. With `resume` they still make the masks, and the
                embeddings run.
            capture: sites whose states are wanted, as the layers below made them: before a replacement at that
                site. Of packed sequences it is the padded states, (B, T, H). They keep their graph if gradients
                are on. No other state is kept.
            replace: for each site, a state of the same shape, dtype and device as the one there, or a
                function from that state to such a one. Gradients flow to it. Under autocast it is cast to the
                dtype there.
            stop: leave the model as soon as the state of this site is known; the output is None.
            resume: `(site, state)` goes on from that site with that state. The layers of the chain below
                don't run, except for the first one where that has yet to show how it returns its state or makes
                what all of them need (T5's position bias), and except for all where each gives the next more than
                the state. Nor does the site's own module, once it has run under this handle and was seen to return
                the state alone. The state must be like the one entering the chain, if it is above that.
            call: what to call with the inputs in place of the model: a function that calls the model once.

        Returns:
            `Run(output, states)`.

        Raises:
            TypeError, ValueError: a site that there isn't or that this run does not pass, a state that does
                not fit, a module that has no tensor where the site's `index` says.
            RuntimeError: the handle was removed; another run of this model is under way; a site was not
                passed exactly once; part of the model is compiled in place; gradient checkpointing is on,
                which would compute layers again without the replacement.
        """
        model = self.model
        plan = self._plan(capture, replace, stop, resume)
        self._check_call(inputs, resume is not None)
        output = None
        with _only_run_of(self._enclosing), ExitStack() as undo:
            plan.undo = undo
            if self._chain:
                self._learn(self._chain[0], plan)
            if resume is not None:
                self._skip_below(*resume, plan)
            for k in sorted(plan.visited):
                self._hook(k, partial(plan.visit, k), plan)
            try:
                output = (call or model)(**{k: v for k, v in inputs.items() if k not in self._not_taken})
            except _Stop:
                pass
        for k in sorted(plan.visited - plan.reached):
            raise RuntimeError(
                f"the run did not pass site {k} ({self.sites[k]}). Do the inputs go round it, as "
                "inputs_embeds instead of input_ids goes round the word embedding?"
            )
        return Run(None if stop is not None else output, plan.states)

    def _plan(
        self,
        capture: Iterable[int],
        replace: Mapping[int, Replacement] | None,
        stop: int | None,
        resume: tuple[int, Tensor] | None,
    ) -> _Plan:
        """The checked request."""
        if not isinstance(capture, Iterable):
            raise TypeError(f"capture: expected site numbers, as in (0, 3), got {type(capture).__name__}")
        if not isinstance(replace, Mapping | None):
            raise TypeError(f"replace: expected a mapping, as in {{0: state}}, got {type(replace).__name__}")
        plan = _Plan(self.sites, {self._number(k) for k in capture})
        for k, change in (replace or {}).items():
            if not isinstance(change, Tensor) and not callable(change):
                got = type(change).__name__
                raise TypeError(f"replace: site {k}: expected a tensor or a function, got {got}")
            plan.changes[self._number(k)] = change
        first, last = 0, len(self.sites) - 1
        if stop is not None:
            plan.stop = last = self._number(stop)
        if resume is not None:
            if not isinstance(resume, tuple) or len(resume) != 2 or not isinstance(resume[1], Tensor):
                raise TypeError(f"resume: expected (site number, tensor), got {type(resume).__name__}")
            first = self._number(resume[0])
            if first in plan.changes:
                raise ValueError(f"replace: site {first} is where the run resumes: give its state once")
        asked = sorted(plan.visited)
        if asked and not first <= asked[0] <= asked[-1] <= last:
            raise ValueError(
                f"this run passes the sites {first} to {last} only, but something is asked for at {asked}: "
                "change stop or resume, or leave the others out"
            )
        return plan

    def _number(self, k: int) -> int:
        try:
            number = operator.index(k)
        except TypeError:
            raise TypeError(f"expected the number of a site, got {type(k).__name__}") from None
        if not 0 <= number < len(self.sites):
            name = type(self._model).__name__
            raise ValueError(f"there is no site {number}; the sites of {name} are{listing(self.sites)}")
        return number

    def _check_call(self, inputs: Mapping[str, Any], resumed: bool) -> None:
        if not isinstance(inputs, Mapping):
            raise TypeError(f"inputs: expected a mapping of arguments, got {type(inputs).__name__}")
        config = getattr(self._model, "config", None)
        for flag in ("output_hidden_states", "output_attentions"):
            if resumed and inputs.get(flag, getattr(config, flag, False)):
                raise ValueError(f"{flag}: the layers below the site of resume don't run: use capture")
        for module in self._enclosing:
            name = type(module).__name__
            if module._compiled_call_impl is not None:
                raise RuntimeError(
                    f"{name} was compiled in place, and what it traced may not see the hooks: run a model "
                    "that is not compiled"
                )
            checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
            if checkpointed and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} has gradient checkpointing on, and would run again in backward without the "
                    "hooks: call model.gradient_checkpointing_disable() or model.eval()"
                )

    def _hook(self, k: int, act: Callable[[Tensor], Tensor], plan: _Plan) -> None:
        """Put `act` between the state of site k and what follows it."""
        site, module = self.sites[k], self._modules[k]
        is_meant = self._calls_of(k, plan.undo)

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            if not is_meant():
                return None
            name = argument_name(module, args, site.index)
            state = state_at((kwargs[name],) if name in kwargs else args, site, 0 if name in kwargs else site.index)
            new = act(state)
            if new is state:
                return None
            return (args, {**kwargs, name: new}) if name in kwargs else (with_entry(args, site.index, new), kwargs)

        def after(_: nn.Module, __: tuple, output: Any) -> Any:
            if not is_meant():
                return None
            state = state_at(output, site, site.index)
            new = act(state)
            if isinstance(module, nn.Embedding):  # CTRL and BLIP go on to change it in place
                new = new.clone()
            return None if new is state else with_entry(output, site.index, new)

        if site.side == "input":
            plan.undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:
            self._learn(k, plan)
            plan.undo.callback(module.register_forward_hook(after).remove)

    def _calls_of(self, k: int, undo: ExitStack) -> Callable[[], bool]:
        """A function that, asked at each call of the module of site k, says whether it is the call of the site."""
        site, part = self.sites[k], self._parts[k]
        registered = {s.call for s, m in zip(self.sites, self._modules, strict=True) if m is self._modules[k]}
        calls, running = itertools.count(), [part is None]
        if part is not None:
            undo.callback(part.register_forward_pre_hook(lambda *_: running.__setitem__(0, True)).remove)
            undo.callback(part.register_forward_hook(lambda *_: running.__setitem__(0, False)).remove)

        def is_meant() -> bool:
            if not running[0]:
                return False
            call = next(calls)
            if call > max(registered):
                raise RuntimeError(
                    f"site {k} ({site}) was passed {'twice' if call == 1 else 'once more than registered'} in one "
                    "run: its module is shared or called again, so that it has no single state. Register a Site for "
                    "each `call` of it, or sites that are passed once"
                )
            return call == site.call

        return is_meant

    def _kind(self, k: int) -> Any:
        """What returns its state alike: the layers of one class, which one loop calls; another module by itself."""
        module = self._modules[k]
        return type(module) if module in self.layers else module

    def _learn(self, k: int, plan: _Plan) -> None:
        """See how the module of site k returns its state, and whether the layer above it is given anything else."""
        module, kind, index = self._modules[k], self._kind(k), self._index_in_output(k)
        layers = self.layers
        above = layers[layers.index(module) + 1 :][:1] if kind is not module else []
        returned: list[Any] = []

        def remember(output: Any) -> None:
            plan.forms[kind] = self._forms[kind] = emptied(output)

        def note(_: nn.Module, __: tuple, output: Any) -> None:
            rest = [x for x in others(output, index) if x is not None]
            if not isinstance(entry(output, index), Tensor):
                return
            if not rest or layers == [module]:
                remember(output)
            elif kind is not module and hands_on(module):
                plan.forms.setdefault(kind, output)
            else:
                returned[:] = [output]

        def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [*args, *kwargs.values()]
            if returned and not any(x is y for x in others(returned[0], index) if x is not None for y in given):
                remember(returned[0])

        plan.undo.callback(module.register_forward_hook(note).remove)
        for layer in above:
            plan.undo.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)

    def _index_in_output(self, k: int) -> int:
        same = (j for j, site in enumerate(self.sites) if site.side == "output" and self._kind(j) == self._kind(k))
        return next((self.sites[j].index for j in same), 0)

    def _skip_below(self, k: int, state: Tensor, plan: _Plan) -> None:
        """Have the chain below site k return at once, and `state` enter at k."""
        plan.forms.update(self._forms)
        plan.given[k] = state
        below = [j for j in self._chain if j < k]
        if not below or self.sites[below[0]].side == "input":
            # What the layers below return is read by nobody, but the first of them still gets its true input.
            self._hook(below[0] if below else k, partial(_compared, state, k), plan)
        skipped: dict[nn.Module, set[int]] = {}
        for j in (*below, *([k] if self.sites[k].side == "output" and k > 0 else [])):
            module = self._modules[j]
            if module not in skipped:
                skipped[module] = set()
                self._learn(j, plan)
                self._return_at_once(j, state, skipped[module], plan)
            skipped[module].add(self.sites[j].call)

    def _return_at_once(self, k: int, state: Tensor, skipped: set[int], plan: _Plan) -> None:
        """In those of its calls the module of site k returns `state`, if it is known how."""
        kind, index = self._kind(k), self._index_in_output(k)
        attributes, calls, whole = self._modules[k].__dict__, itertools.count(), self._modules[k].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if next(calls) in skipped and kind in plan.forms:
                return with_entry(plan.forms[kind], index, state)
            return whole(*args, **kwargs)

        if "forward" in attributes:  # accelerate and others leave one on the instance
            plan.undo.callback(attributes.__setitem__, "forward", attributes["forward"])
        else:
            plan.undo.callback(attributes.__delitem__, "forward")
        attributes["forward"] = forward


class _Stop(BaseException):
    """Leaves the model's forward; not an Exception, so that a model's own `except Exception` lets it pass."""


@dataclass
class _Plan:
    """One run: what is to be done at which site, and what has been."""

    sites: tuple[Site, ...]
    capture: set[int]
    changes: dict[int, Replacement] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    stop: int | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)
    forms: dict[Any, Any] = field(default_factory=dict)
    undo: ExitStack = field(default_factory=ExitStack)

    @property
    def visited(self) -> set[int]:
        return {*self.capture, *self.changes, *self.given, *(() if self.stop is None else (self.stop,))}

    def visit(self, k: int, state: Tensor) -> Tensor:
        """The state that goes on from site k."""
        self.reached.add(k)
        state = self.given.get(k, state)
        if k in self.capture:
            self.states[k] = state
        if k in self.changes:
            change = self.changes[k]
            state = _fitting(change if isinstance(change, Tensor) else change(state), state, k)
        if k == self.stop:
            raise _Stop
        return state


_running: set[int] = set()
_running_lock = Lock()


@contextmanager
def _only_run_of(modules: Iterable[nn.Module]) -> Iterator[None]:
    """One run at a time of models that share any of these, as a model with a head and its base model do."""
    keys = {id(module) for module in modules}
    with _running_lock:
        if keys & _running:
            raise RuntimeError(
                "another run of this model is under way, in another thread or around this one, and its hooks "
                "would be met here too: wait for it, or give each thread its own copy of the model"
            )
        _running.update(keys)
    try:
        yield
    finally:
        with _running_lock:
            _running.difference_update(keys)


def _enclosing(model: nn.Module, sites: Iterable[Site]) -> list[nn.Module]:
    """The sites' modules and all that contain them, each once."""
    paths = {""}
    for site in sites:
        parts = site.module.split(".")
        paths.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return [model.get_submodule(path) for path in sorted(paths)]


def _fitting(new: Tensor, state: Tensor, k: int) -> Tensor:
    """`new`, if it can stand where `state` stood."""
    if not isinstance(new, Tensor):
        raise TypeError(f"replace: site {k}: the function returned {type(new).__name__}, expected a tensor")
    if new.is_floating_point() and torch.is_autocast_enabled(state.device.type):
        new = new.to(state.dtype)
    _compared(new, k, state)
    return new


def _compared(new: Tensor, k: int, state: Tensor) -> Tensor:
    """`state`, if `new` is like it."""
    # Under autocast the dtype of a state is that of the operation it came from: two sites may differ.
    same_dtype = new.dtype == state.dtype or torch.is_autocast_enabled(state.device.type)
    if new.shape != state.shape or new.device != state.device or not same_dtype:
        raise ValueError(f"the state given for site {k} is {_words(new)}, expected {_words(state)}: make it so")
    return state


def _words(state: Tensor) -> str:
    return f"{tuple(state.shape)} {str(state.dtype).removeprefix('torch.')} on {state.device}"
