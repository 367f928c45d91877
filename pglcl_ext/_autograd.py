"""Makes ops differentiable, and usable in torch.func, torch.compile and torch.export.

``torch.library.register_autograd`` costs about 100 us in every step, several times as much as a small op. So a plain
``torch.autograd.Function`` differentiates an op here. The public functions apply it in eager mode. It is also the op's
autograd kernel, for callers of the op itself, such as compilers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree

__all__ = [
    "OpFunction",
    "exportable",
    "in_functorch",
    "in_graph",
    "is_traced",
    "op_in_graph",
    "readable",
    "records_gradients",
    "register",
    "register_op",
    "run",
    "savable",
]

Result = TypeVar("Result")

library = torch.library.Library("pglcl_ext", "FRAGMENT")
in_functorch = torch._C._are_functorch_transforms_active
unwrap_if_dead = torch._C._functorch.unwrap_if_dead
within_layer = torch._C._dispatch_tls_is_dispatch_key_excluded
below_autograd = torch._C._AutoDispatchBelowAutograd


class OpFunction(torch.autograd.Function):
    """An op and its backward op, for PyTorch's autograd.

    A subclass names both, and the functions that make their results for fake tensors. It is applied to the tensors that
    gradients flow to, and to one tuple of all arguments of the op: autograd does not look into it, which saves time.
    Arguments are `flat` wherever they are a tuple in the order of the op's schema. `backward` returns a gradient for
    each of `gradients_flow_to`, and None for the tuples of arguments and of outputs.
    """

    name: ClassVar[str]  # the public function
    op: ClassVar[Any]
    backward_op: ClassVar[Any]
    gradients_flow_to: ClassVar[tuple[str, ...]]  # names of arguments of the op
    only_first_differentiable: ClassVar[bool] = False  # of the op's outputs, instead of all
    fake: ClassVar[Callable[..., Any]]  # of the op: tensors without content, in the shapes that it returns
    backward_fake: ClassVar[Callable[..., Any]]
    backward_function: ClassVar[type[OpFunction]]  # of the backward op; `register` makes it
    node: ClassVar[Callable[..., Any]]  # makes the node of eager mode; `register` defines it
    backward_of_class: ClassVar[Any]  # the method that a subclass defines as `backward`
    backward_in_graph: ClassVar[Callable[..., Any]]  # calls the backward op
    leading_tensors: ClassVar[int]  # number of the op's arguments before the first that is no tensor
    places: ClassVar[tuple[int, ...]]  # of `gradients_flow_to` among the op's arguments
    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kinds = [str(a.type) for a in cls.op._schema.arguments]
        cls.leading_tensors = next((i for i, kind in enumerate(kinds) if "Tensor" not in kind), len(kinds))
        names = [a.name for a in cls.op._schema.arguments]
        cls.places = tuple(names.index(name) for name in cls.gradients_flow_to)
        if isinstance(cls.__dict__.get("backward"), classmethod):
            cls.backward_of_class = cls.__dict__["backward"]

        # Compiled autograd traces no backward that is a method, and calls no op that is an attribute.
        def backward(ctx: Any, *grads: Any) -> Any:
            return cls.backward_of_class(ctx, *grads)

        backward_op = getattr(cls, "backward_op", None)
        cls.backward = staticmethod(backward)  # type: ignore[method-assign]
        cls.backward_in_graph = staticmethod(lambda *arguments: backward_op(*arguments))  # type: ignore[misc]

    @classmethod
    def call(cls, flat: tuple[Any, ...]) -> Any:
        """The op's outputs, differentiable if an input needs a gradient."""
        if forward_ad._current_level >= 0 or (in_functorch() and torch.is_grad_enabled()):
            return cls.apply(*cls.inputs(flat))  # type: ignore[no-untyped-call]
        outputs = run(cls.op, flat)
        if records_gradients():
            inputs = cls.inputs(flat)
            for t in inputs[:-1]:
                if t is not None and t.requires_grad:
                    return cls.node(*inputs, outputs)
        return outputs

    @classmethod
    def checked(cls, check: Callable[[Any], None], arguments: Any, flat: tuple[Any, ...]) -> Any:
        """As :meth:`call`; if the op refuses its tensors, `check` says why.

        An op checks its tensors itself. `check` says more, but takes as long as a small op. Limits of a GPU are known
        to the op alone.
        """
        try:
            return cls.call(flat)
        except Exception as error:
            refusal = error
        try:
            check(arguments)
            if beyond := re.search(r"limit of the GPU: (.*)", str(refusal)):
                raise ValueError(beyond[1]) from None
            raise refusal
        finally:
            del refusal  # with its traceback it would keep this frame alive, and so the tensors

    @classmethod
    def inputs(cls, flat: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of `apply`. A tensor of a torch.func transform that has ended becomes the one it stood for."""
        tensors = [flat[place] for place in cls.places]
        return (*[t if t is None else unwrap_if_dead(t) for t in tensors], flat)

    @classmethod
    def forward(cls, *inputs: Any) -> Any:
        return run(cls.op, inputs[-1])

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if cls.only_first_differentiable:
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)
        cls.keep(ctx, inputs[-1], output)

    @classmethod
    def keep(cls, ctx: Any, flat: tuple[Any, ...], outputs: Any) -> None:
        """Saves what the backward pass needs."""
        raise NotImplementedError

    @classmethod
    def save(cls, ctx: Any, outputs: tuple[Tensor, ...], flat: tuple[Any, ...]) -> None:
        """Saves `outputs` and the op's tensors as ``saved_tensors``, and its other arguments as ``options``."""
        ctx.save_for_backward(*outputs, *[savable(t) for t in flat[: cls.leading_tensors]])
        ctx.options = flat[cls.leading_tensors :]

    @classmethod
    def run_backward(cls, *arguments: Any) -> Any:
        """Runs the backward op, which refuses to be differentiated again."""
        if torch.compiler.is_dynamo_compiling():  # by compiled autograd
            return cls.backward_in_graph(*arguments)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or in_functorch():
            return cls.backward_function.call(arguments)
        return run(cls.backward_op, arguments)  # the usual case: gradients are not differentiated again

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"pglcl_ext.{cls.name} has no forward-mode derivative")


def records_gradients() -> bool:
    """Whether what is computed now can be differentiated. `torch.enable_grad` has no effect in inference mode."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def savable(t: Tensor | None) -> Tensor | None:
    """`t`, or a copy if it was made in inference mode: autograd saves no such tensor, which may change unseen."""
    return t.clone() if t is not None and t.is_inference() else t


def run(op: Any, arguments: tuple[Any, ...]) -> Any:
    """Runs the op's kernel below autograd, since the caller is the op's autograd kernel."""
    if in_functorch():
        if not within_layer(DispatchKey.FuncTorchDynamicLayerFrontMode):
            return op(*arguments)
        # This transform has added its node. The transforms around it still have to add theirs, below it.
        with torch.enable_grad(), below_autograd():
            return op(*arguments)
    with below_autograd():
        return op(*arguments)


def _for_each(op: Any) -> Callable[..., Any]:
    """A rule for torch.vmap: one call for each element of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        size = info.batch_size
        if size == 0:  # one element of zeros gives the shapes of results without elements
            arguments = tuple(
                a.new_zeros((*a.shape[:d], 1, *a.shape[d + 1 :])) if isinstance(d, int) else a
                for a, d in zip(arguments, in_dims)
            )
        results = []
        for i in range(max(size, 1)):
            results.append(op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims))))
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        stacked = tuple(torch.stack(parts)[:size] for parts in zip(*results))
        return stacked, (0,) * len(stacked)

    return rule


def register_op(op: Any, fake: Callable[..., Any]) -> None:
    """Registers an op's results for fake tensors, and its rule for torch.vmap."""
    torch.library.register_fake(op, fake, lib=library)
    torch.library.register_vmap(op, _for_each(op), lib=library)


def _of_one_level(function: type[OpFunction]) -> Any:
    """The same node without torch.func, which takes every ``torch.autograd.Function`` for one of all levels."""
    methods = {name: staticmethod(getattr(function, name)) for name in ("forward", "setup_context", "backward", "jvp")}
    return type(f"{function.__name__}OfOneLevel", (torch.autograd.function._SingleLevelFunction,), methods)


def _in_eager_mode(function: type[OpFunction]) -> Callable[..., Any]:
    """The same node for an op that has run, from the inputs of `apply` and the op's outputs.

    It has no outputs but the differentiable ones, and no `setup_context`: each takes as long as a part of a small op.
    """
    first, single = function.only_first_differentiable, len(function.op._schema.returns) == 1

    def forward(ctx: Any, *inputs: Any) -> Any:
        *_, flat, outputs = inputs
        function.keep(ctx, flat, outputs[0] if single else outputs)
        if first:
            ctx.set_materialize_grads(False)
        return outputs[0] if first or single else outputs

    methods = {"forward": forward, "backward": function.backward, "jvp": function.jvp}
    node = type(function.__name__, (torch.autograd.Function,), {name: staticmethod(m) for name, m in methods.items()})
    # Function.apply would first bind default arguments, of which there are none, and unwrap tensors, as `inputs` does.
    apply = super(torch.autograd.Function, node).apply  # type: ignore[misc]
    if single:  # in a tuple, or it would be an input, and the result a view of it
        return lambda *inputs: apply(*inputs[:-1], inputs[-1:])
    return (lambda *inputs: (apply(*inputs), *inputs[-1][1:])) if first else apply


def _register_function(function: type[OpFunction]) -> None:
    one_level = _of_one_level(function)
    function.node = staticmethod(_in_eager_mode(function))

    def kernel(*flat: Any) -> Any:
        if not in_functorch():
            return function.call(flat)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            with below_autograd():
                return function.op(*flat)
        # The transform is at its own level of autograd, where PyTorch's own kernels add their nodes, too.
        with enable_single_level_autograd_function():
            return one_level.apply(*function.inputs(flat))

    library.impl(function.op, kernel, "Autograd")
    register_op(function.op, function.fake)


def register(function: type[OpFunction]) -> type[OpFunction]:
    """Makes `function` the derivative of its op. Its backward op gets one that refuses, with the function's name."""

    class Backward(OpFunction):
        name, op, fake = function.name, function.backward_op, function.backward_fake
        gradients_flow_to = tuple(a.name for a in op._schema.arguments if "Tensor" in str(a.type))

        @classmethod
        def keep(cls, ctx: Any, flat: tuple[Any, ...], outputs: Any) -> None:
            pass

        @classmethod
        def backward(cls, ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"pglcl_ext.{cls.name} cannot be differentiated twice")

    function.backward_function = Backward
    _register_function(function)
    _register_function(Backward)
    return function


# --- compilers ------------------------------------------------------------------------------------------------------


def readable(t: Tensor) -> bool:
    """Whether the elements of `t` can be read now, without waiting for a device or splitting a graph."""
    # Tracers' tensors override __torch_dispatch__. Other subclasses hold their elements.
    plain = type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ and not in_functorch()
    return plain and t.device.type == "cpu" and not torch.compiler.is_compiling()


def is_traced() -> bool:
    """Whether a graph is being made, which must hold the op itself."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def exportable(result: type[Result]) -> type[Result]:
    """Gives a NamedTuple the name by which torch.export.save writes it, and load finds it."""
    _pytree._register_namedtuple(result, serialized_type_name=f"pglcl_ext.{result.__name__}")
    return result


def _floats(op: Any) -> frozenset[int]:
    return frozenset(i for i, a in enumerate(op._schema.arguments) if str(a.type) == "float")


def _twin(op: Any, fake: Callable[..., Any]) -> tuple[Any, Callable[..., Any]]:
    """An op like `op` that takes floats as scalar tensors and integers as symbols, and its fake."""
    schema = str(op._schema).removeprefix("pglcl_ext::")
    for kind, traced in (("float", "Tensor"), (r"int\[\]", "SymInt[]"), ("int", "SymInt")):
        schema = re.sub(rf"\b{kind} (?=\w)", f"{traced} ", schema)
    name = f"{op._opname}_traced"
    library.define(schema.replace(op._opname, name, 1))
    twin = getattr(torch.ops.pglcl_ext, name).default
    floats = _floats(op)

    def kernel(*flat: Any) -> Any:
        return op(*(float(a) if i in floats else a for i, a in enumerate(flat)))

    def twin_fake(*flat: Any) -> Any:
        return fake(*(1.0 if i in floats else a for i, a in enumerate(flat)))

    library.impl(twin, kernel, "CompositeExplicitAutograd")
    return twin, twin_fake


def _in_graph(op: Any, twin: Any) -> Callable[..., Any]:
    floats = _floats(op)

    def call(*flat: Any) -> Any:
        if torch.compiler.is_exporting() or not torch.compiler.is_compiling():
            return op(*flat)
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return twin(*(one * a if i in floats else a for i, a in enumerate(flat)))

    return call


def in_graph(function: type[OpFunction]) -> Callable[..., Any]:
    """The op to call in a graph.

    torch.compile turns a number that an op gets into a constant, and compiles again for every other value; after a few
    it gives up. So its graphs hold a twin of the op that takes varying numbers. Exported programs hold the op itself.
    """
    twin, fake = _twin(function.op, function.fake)
    backward_twin, backward_fake = _twin(function.backward_op, function.backward_fake)
    ops = {"op": twin, "backward_op": backward_twin}
    fakes = {"fake": staticmethod(fake), "backward_fake": staticmethod(backward_fake)}
    register(type(f"{function.__name__}Traced", (function,), ops | fakes))
    return _in_graph(function.op, twin)


def op_in_graph(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`in_graph`, for an op that needs no derivative."""
    twin, twin_fake = _twin(op, fake)
    register_op(twin, twin_fake)
    return _in_graph(op, twin)
