"""ConvLSTM1D, ConvLSTM2D and ConvLSTM3D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cuconv import activations, geometry, ops, seeding
from cuconv.layers.base import Array, Shape, as_flag, as_shape
from cuconv.layers.window import WindowLayer

GATES = 4  # input, forget, cell, output, in this order along the last axis of every weight
BLOCK_BYTES = 64 << 20  # most that inference convolves ahead of the recurrence


class _Saved(NamedTuple):
    """What the backward pass needs of a forward pass; arrays with a leading time axis are in processing order."""

    x: Array  # [steps * batch, ...]: the input, times the dropout masks of the four gates if there are any
    convolved: Array  # [steps, batch, ..., 4 * filters]
    hidden: list[Array]  # before each step
    cells: list[Array]
    mask: Array  # of the input, or None
    recurrent_mask: Array
    states_given: bool


class ConvLSTM(WindowLayer):
    """LSTM over time whose products are convolutions over space; input [batch, time, ..., channels].

    With X = conv(x, kernel) + bias and H = conv(h, recurrent_kernel, padding="same"), split into four gates:
    i = ra(X_i + H_i), f = ra(X_f + H_f), c = f * c + i * a(X_c + H_c), o = ra(X_o + H_o), h = o * a(c), where a is
    `activation` and ra `recurrent_activation`.

    Weights: `kernel` [kernel_size..., in_channels, 4 * filters], `recurrent_kernel`
    [kernel_size..., filters, 4 * filters] and `bias` [4 * filters].

    Args:
        filters: number of output channels.
        kernel_size: taps; one integer for all spatial axes or one for each, like `strides` and `dilation_rate`.
        strides: of the convolution of the input. Not above 1 together with `dilation_rate`.
        padding: "valid" or "same", of the convolution of the input.
        data_format: "channels_last" [batch, time, ..., channels], "channels_first" [batch, time, channels, ...] or
            None (last).
        dilation_rate: of the convolution of the input.
        activation: name, callable or config dict; likewise `recurrent_activation`.
        recurrent_activation: of the three gates.
        use_bias: whether there is a bias.
        kernel_initializer: name, callable, config dict or array of the kernel's shape; likewise
            `recurrent_initializer` and `bias_initializer`.
        unit_forget_bias: whether the forget quarter of the bias starts at 1.
        kernel_regularizer: None, name, callable or config dict; likewise `recurrent_regularizer`, `bias_regularizer`
            and `activity_regularizer`.
        kernel_constraint: None, name, callable or config dict; likewise `recurrent_constraint`, `bias_constraint`.
        dropout: fraction of the input dropped with `training=True`, clamped to [0, 1]; 0 and 1 drop nothing, as in
            Keras. Each gate has its own mask, the same at every step.
        recurrent_dropout: the same of the hidden state.
        seed: of the dropout masks.
        return_sequences: whether the output is that of every step, [batch, time, ...], or of the last.
        return_state: whether to return (output, h, c).
        go_backwards: whether time runs backwards; the outputs stay in the order of processing.
        stateful: whether each call starts from the states of the one before; the batch size is then fixed.
        **kwargs: see `Layer`; also `unroll` and `zero_output_for_mask`, which change nothing here.
    """

    recurrent_kernel: Array
    _per_axis = ()
    _time_axes = 1
    _unknown_channels = ValueError
    _obsolete: ClassVar[Mapping[str, Any]] = {"time_major": False}

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        **kwargs: Any,
    ) -> None:
        self.unroll = as_flag(kwargs.pop("unroll", False), "unroll")
        self.zero_output_for_mask = as_flag(kwargs.pop("zero_output_for_mask", False), "zero_output_for_mask")
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.filters = filters  # checked by `build`, as in Keras
        self._set_window(
            kernel_size, strides, padding, data_format, dilation_rate, activation, use_bias, allow_zero_strides=True
        )
        self.recurrent_activation = activations.get(recurrent_activation)
        self.unit_forget_bias = as_flag(unit_forget_bias, "unit_forget_bias")
        self._set_options(
            kernel=(kernel_initializer, kernel_regularizer, kernel_constraint),
            recurrent=(recurrent_initializer, recurrent_regularizer, recurrent_constraint),
            bias=(bias_initializer, bias_regularizer, bias_constraint),
        )
        self.dropout = min(1.0, max(0.0, dropout))
        self.recurrent_dropout = min(1.0, max(0.0, recurrent_dropout))
        self.seed = None if seed is None else seeding.check_seed(seed)
        self._masks = np.random.default_rng(seeding.draw_seed() if seed is None else seed)
        self.return_sequences = as_flag(return_sequences, "return_sequences")
        self.return_state = as_flag(return_state, "return_state")
        self.go_backwards = as_flag(go_backwards, "go_backwards")
        self.stateful = as_flag(stateful, "stateful")
        self.states: list[Array] | None = None  # [h, c] after the last call of a stateful layer

    # --- Shapes ---

    def _geometry(self, shape: Shape) -> geometry.ConvShape:
        """The convolution of one step's input, for the input of all steps."""
        step = (shape[0], *shape[2:])
        channels = 1 if self._channels(shape) is None else self._known_channels(shape)
        step = geometry.join_shape(*geometry.split_shape(step, self.data_format)[:2], channels, self.data_format)
        return geometry.conv_shape(
            step, (*self.kernel_size, channels, GATES * self._known_filters()), **self._checked_options()
        )

    def _state_shape(self, shape: Shape) -> Shape:
        """The shape of h and c for the input of all steps."""
        window = self._geometry(shape)
        return geometry.join_shape(window.batch, window.out_size, window.filters // GATES, self.data_format)

    def _known_filters(self) -> int:
        filters = geometry.as_int(self.filters)
        if filters is None or filters < 1:
            raise ValueError(f"`filters` must be an integer >= 1. Received: filters={self.filters!r}")
        return filters

    def _weight_shapes(self, input_shape: Shape) -> dict[str, tuple[int, ...]]:
        channels, filters = self._known_channels(input_shape), self._known_filters()
        window = self._geometry(input_shape)
        if None in window.in_size:
            raise ValueError(
                f"the spatial axes of the inputs of a ConvLSTM must be known. Received: inputs.shape={input_shape}"
            )
        if self.stateful and input_shape[0] is None:
            raise ValueError(f"the batch size of a stateful layer must be known. Received: inputs.shape={input_shape}")
        kernels = {
            "kernel": (*self.kernel_size, channels, GATES * filters),
            "recurrent_kernel": (*self.kernel_size, filters, GATES * filters),
        }
        return self._with_bias(kernels, GATES * filters)

    def _initial_value(self, name: str, shape: tuple[int, ...]) -> Array:
        value = super()._initial_value(name, shape)
        if name == "bias" and self.unit_forget_bias:
            filters = shape[0] // GATES
            value = np.array(value)
            value[filters : 2 * filters] = 1
        return value

    def _check_shape(self, shape: Shape) -> None:
        super()._check_shape(shape)
        built = self._build_shape
        if built is not None:
            if tuple(shape[2:]) != built[2:]:
                raise ValueError(
                    f"layer {self.name!r} was built for steps of shape {built[2:]}. "
                    f"Received: inputs.shape={tuple(shape)}"
                )
            if self.stateful and shape[0] != built[0]:
                raise ValueError(
                    f"layer {self.name!r} is stateful and was built for batches of {built[0]}. "
                    f"Received: inputs.shape={tuple(shape)}"
                )

    def compute_output_shape(self, input_shape: Sequence[int | None], initial_state_shape: Any = None) -> Any:
        """Shape of the output for inputs of `input_shape`; with `return_state` the shapes of (output, h, c)."""
        shape = as_shape(input_shape, "input_shape")
        super()._check_shape(shape)
        state = self._state_shape(shape)
        output = (state[0], shape[1], *state[1:]) if self.return_sequences else state
        return (output, state, state) if self.return_state else output

    # --- Calls ---

    def __call__(self, sequences: Any, /, initial_state: Sequence[Any] | None = None, *, training: bool = False) -> Any:
        """The output for an array, or a symbolic tensor for a symbolic tensor.

        Args:
            sequences: [batch, time, ..., channels], or in the layer's data format.
            initial_state: [h, c] to start from instead of zeros, or of the states of a stateful layer.
            training: whether dropout is active.
        """
        return self._apply(self._with_states(sequences, initial_state), training)

    def forward(self, sequences: Any, /, initial_state: Sequence[Any] | None = None, *, training: bool = True) -> Any:
        """The output, keeping what `backward` needs; `backward` gives (dx, dh, dc) if there is an initial state."""
        return self._apply_recording(self._with_states(sequences, initial_state), training)

    def reset_states(self) -> None:
        """Lets the next call of a stateful layer start from zeros."""
        self.states = None

    reset_state = reset_states

    @staticmethod
    def _with_states(sequences: Any, initial_state: Sequence[Any] | None) -> tuple[Any, ...]:
        states = () if initial_state is None else tuple(initial_state)
        if len(states) not in (0, 2):
            raise ValueError(f"`initial_state` must be [h, c]. Received: {len(states)} states")
        return (sequences, *states)

    def _call_arguments(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        return list(tensors[:1]), {"initial_state": list(tensors[1:])} if len(tensors) > 1 else {}

    def _infer(self, *inputs: Array, training: bool) -> Any:
        return self._scan(inputs, training, keep=False)[0]

    def _record(self, *inputs: Array, training: bool) -> tuple[Any, _Saved]:
        return self._scan(inputs, training, keep=True)

    def _scan(self, inputs: tuple[Array, ...], training: bool, *, keep: bool) -> tuple[Any, _Saved]:
        """The outputs, and what the backward pass needs of every step with `keep`, else of the last block only."""
        x = inputs[0]
        batch, steps = x.shape[:2]
        if steps == 0:
            raise IndexError(f"a ConvLSTM needs at least one time step. Received: inputs.shape={x.shape}")
        h, c = self._start(inputs)
        recurrent = self._in_compute_dtype(self.recurrent_kernel)
        mask = self._dropout_mask(x[:, 0], self.dropout, training)
        recurrent_mask = self._dropout_mask(h, self.recurrent_dropout, training)
        outputs = np.empty_like(h, shape=(batch, steps, *h.shape[1:])) if self.return_sequences else None
        x = x[:, ::-1] if self.go_backwards else x
        step_bytes = GATES * max(1, h.size) * h.dtype.itemsize
        block = steps if keep else max(1, BLOCK_BYTES // step_bytes)
        hidden, cells = [], []
        for start in range(0, steps, block):
            x_block, convolved = self._convolve_input(x[:, start : start + block], mask)
            for step, x_step in enumerate(convolved, start):
                if keep:
                    hidden.append(h)
                    cells.append(c)
                h, c = self._step(x_step, h, c, recurrent, recurrent_mask)
                if outputs is not None:
                    outputs[:, step] = h
        saved = _Saved(x_block, convolved, hidden, cells, mask, recurrent_mask, len(inputs) > 1)
        if self.stateful:
            self.states = [h, c]
        if outputs is None:
            outputs = h.copy() if self.return_state or self.stateful else h
        return (outputs, h.copy(), c.copy()) if self.return_state else outputs, saved

    def _start(self, inputs: tuple[Array, ...]) -> Sequence[Array]:
        """h and c before the first step."""
        x = inputs[0]
        shape: Any = self._state_shape(x.shape)
        states = inputs[1:] or self.states or [np.zeros_like(x, shape=shape) for _ in range(2)]
        if any(tuple(state.shape) != shape for state in states):
            raise ValueError(
                f"the states of layer {self.name!r} have shape {shape} for such inputs. "
                f"Received: initial_state of shapes {[tuple(state.shape) for state in states]}"
            )
        return states

    def _dropout_mask(self, like: Array, rate: float, training: bool) -> Array:
        """One mask for each gate, side by side along the channels; None where nothing is dropped."""
        if not (training and 0.0 < rate < 1.0):
            return None
        wide: Any = self._with_channels(like.shape, GATES * like.shape[self._channel_axis])
        kept = self._masks.random(wide, np.float32) >= rate
        return ops.like((kept / (1.0 - rate)).astype(self._compute), like)

    @property
    def _channel_axis(self) -> int:
        """Axis of the channels, with or without a time axis in front."""
        return -1 if self.data_format == geometry.CHANNELS_LAST else -1 - len(self.kernel_size)

    def _for_gates(self, x: Array, mask: Array) -> Array:
        """x once for each gate, side by side along the channels, times the masks."""
        return np.concatenate([x] * GATES, axis=self._channel_axis) * mask

    def _sum_of_gates(self, dx: Array, mask: Array) -> Array:
        """The gradient of x, given that of `_for_gates(x, mask)`."""
        i, f, c, o = np.split(dx * mask, GATES, axis=self._channel_axis)
        return (i + f) + (c + o)

    def _convolve_input(self, x: Array, mask: Array) -> tuple[Array, Array]:
        """The input as one long batch [steps * batch, ...], masked, and its convolution [steps, batch, ...].

        Four masked copies side by side and four groups give each gate its own mask with the stored kernel as it is.
        """
        batch, steps = x.shape[:2]
        x = x.swapaxes(0, 1)
        if mask is not None:
            x = self._for_gates(x, mask)
        x = x.reshape(steps * batch, *x.shape[2:])
        kernel = self._in_compute_dtype(self.kernel)
        y = ops.conv(x, kernel, self._operation_bias(), groups=1 if mask is None else GATES, **self._options)
        return x, y.reshape(steps, batch, *y.shape[1:])

    @property
    def _recurrent_options(self) -> dict[str, Any]:
        return {"padding": "same", "data_format": self.data_format, "groups": GATES}

    @property
    def _step_options(self) -> dict[str, Any]:
        return {
            "data_format": self.data_format,
            "activation": self.activation,
            "recurrent_activation": self.recurrent_activation,
        }

    def _step(self, x: Array, h: Array, c: Array, recurrent: Array, mask: Array) -> tuple[Array, Array]:
        """The states after one step, x being the convolved input."""
        if mask is not None:
            x = x + ops.conv(self._for_gates(h, mask), recurrent, **self._recurrent_options)
            recurrent = None
        return ops.conv_lstm_step(x, h, c, None, recurrent, None, **self._step_options)

    def _propagate(self, saved: _Saved, dy: Any) -> tuple[Any, list[Array]]:
        x, convolved, hidden, cells, mask, recurrent_mask, states_given = saved
        steps, batch = convolved.shape[:2]
        recurrent = self._in_compute_dtype(self.recurrent_kernel)
        dy, dh, dc = dy if self.return_state else (dy, None, None)
        dh = np.zeros_like(hidden[0]) if dh is None else dh
        dc = np.zeros_like(cells[0]) if dc is None else dc
        d_recurrent = np.zeros_like(self.recurrent_kernel)
        d_convolved = np.empty_like(convolved)
        for step in reversed(range(steps)):
            if dy is not None and (self.return_sequences or step == steps - 1):
                dh = dh + (dy[:, step] if self.return_sequences else dy)
            d_convolved[step], dh, dc, share = self._step_gradients(
                convolved[step], hidden[step], cells[step], recurrent, recurrent_mask, dh, dc
            )
            d_recurrent += share.astype(self._variable, copy=False)
        d_convolved = d_convolved.reshape(steps * batch, *d_convolved.shape[2:])
        kernel = self._in_compute_dtype(self.kernel)
        groups = 1 if mask is None else GATES
        gradients = [ops.conv_kernel_grad(x, d_convolved, kernel.shape, groups=groups, **self._options), d_recurrent]
        if self.bias is not None:
            gradients.append(ops.bias_grad(d_convolved, data_format=self.data_format))
        dx = ops.conv_input_grad(d_convolved, kernel, x.shape, groups=groups, **self._options)
        dx = dx.reshape(steps, batch, *dx.shape[1:])
        dx = dx if mask is None else self._sum_of_gates(dx, mask)
        dx = dx.swapaxes(0, 1)
        dx = dx[:, ::-1] if self.go_backwards else dx
        return ((dx, dh, dc) if states_given else dx), gradients

    def _step_gradients(
        self, x: Array, h: Array, c: Array, recurrent: Array, mask: Array, dh: Array, dc: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Gradients of the convolved input, of h and c before the step, and of the recurrent kernel."""
        if mask is None:
            dx, dh, dc, _, d_recurrent, _ = ops.conv_lstm_step_grad(
                x, h, c, None, recurrent, None, dh, dc, **self._step_options
            )
            return dx, dh, dc, d_recurrent
        h4, options = self._for_gates(h, mask), self._recurrent_options
        x = x + ops.conv(h4, recurrent, **options)
        dx, _, dc, _, _, _ = ops.conv_lstm_step_grad(x, h, c, None, None, None, dh, dc, **self._step_options)
        dh = self._sum_of_gates(ops.conv_input_grad(dx, recurrent, h4.shape, **options), mask)
        return dx, dh, dc, ops.conv_kernel_grad(h4, dx, recurrent.shape, **options)

    def get_config(self) -> dict[str, Any]:
        """Keras 3's config of this layer."""
        return {**super().get_config(), "unroll": self.unroll, "zero_output_for_mask": self.zero_output_for_mask}


class ConvLSTM1D(ConvLSTM, rank=1):
    """ConvLSTM over 1-D frames: [batch, time, steps, channels].

    >>> ConvLSTM1D(8, 3, return_sequences=True).compute_output_shape((None, 5, 32, 2))
    (None, 5, 30, 8)
    """


class ConvLSTM2D(ConvLSTM, rank=2):
    """ConvLSTM over images: [batch, time, height, width, channels].

    >>> ConvLSTM2D(8, 3, padding="same").compute_output_shape((None, 5, 32, 32, 2))
    (None, 32, 32, 8)
    """


class ConvLSTM3D(ConvLSTM, rank=3):
    """ConvLSTM over volumes: [batch, time, depth, height, width, channels].

    >>> ConvLSTM3D(2, 2, return_state=True).compute_output_shape((None, 5, 4, 4, 4, 1))
    ((None, 3, 3, 3, 2), (None, 3, 3, 3, 2), (None, 3, 3, 3, 2))
    """
