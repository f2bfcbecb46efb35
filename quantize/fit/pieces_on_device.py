"""The experts of one layer as rounding on a GPU leaves them, where their inputs lie on a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...formats.blocks import BY_NAME
from ...formats.errors import MqError
from ...formats.minimax import expert_name
from ..encode.on_device.answering import answering_down, product
from ..encode.on_device.downs import Down
from ..encode.on_device.factors import factors_of
from ..encode.on_device.kept import KeptOnDevice
from ..encode.on_device.layer import DeviceLayerEncoder, on_device
from ..encode.on_device.moments import rotated_moment
from ..encode.on_device.rounding import Rounder, Under
from ..encode.once import Once, Together
from ..encode.overflow import check_levels
from .pieces import SOURCE, U8, Choice, LayerPieces, Matrices, decoded

Payloads = Mapping[str, U8]


class DevicePieces(LayerPieces):
    """A `LayerPieces` whose importance is a `KeptOnDevice`."""

    importance: KeptOnDevice
    kind = DeviceLayerEncoder

    def expert(self, expert: int) -> dict[Choice, Matrices]:
        """As `LayerPieces.expert`. What is decoded in between is decoded on the thread that asks."""
        plain, once = self.plain(expert), Together()

        def round_all(kept: KeptOnDevice, rounder: Rounder) -> tuple[dict[Choice, Payloads], dict[str, U8]]:
            weights, made = kept.weights(expert), Together()

            def rounded(encoder: DeviceLayerEncoder) -> Payloads:
                begun = encoder.above_down(kept, expert, weights, rounder, made)
                (done,) = encoder.with_downs([begun], kept, rounder, made)
                if isinstance(done, MqError):
                    raise done
                return done.payloads

            whole = {pair: rounded(encoder) for pair, encoder in self._device_encoders().items()}
            alone = [c.down for c in self.choices if c.gate_up is None and c.down is not None]
            return whole, {
                name: self._down_there(name, kept, expert, weights, rounder, made) for name in alone
            }

        whole, alone = on_device(self.encoder, self.importance, round_all)
        both = {pair: decoded(self._encoders[pair], done, plain, once) for pair, done in whole.items()}

        def answer(kept: KeptOnDevice, rounder: Rounder) -> dict[Choice, Tensor]:
            weights, inputs = kept.weights(expert), kept.seen(expert)
            there, found = product(inputs, weights["w1"], weights["w3"]), {}
            for choice in self.choices:
                if choice.down is None and choice.gate_up is not None:
                    above = both[Choice(choice.gate_up, choice.gate_up)]
                    w1, w3 = (torch.from_numpy(m).to(inputs.device) for m in (above.w1, above.w3))
                    found[choice] = answering_down(weights["w2"], there, product(inputs, w1, w3)).cpu()
            return found

        answers = on_device(self.encoder, self.importance, answer)
        out = {SOURCE: plain}
        for choice in self.choices:
            if choice in answers:
                above = both[Choice(str(choice.gate_up), str(choice.gate_up))]
                out[choice] = above._replace(w2=answers[choice].numpy())
            elif choice.gate_up is None and choice.down is not None:
                form = self._encoders[Choice(choice.down, choice.down)].stored.form("w2")
                out[choice] = plain._replace(w2=form.decode(alone[choice.down], plain.w2.shape))
            elif choice != SOURCE:
                out[choice] = both[choice]
        return out

    def _device_encoders(self) -> dict[Choice, DeviceLayerEncoder]:
        return {pair: made for pair, made in self._encoders.items() if isinstance(made, DeviceLayerEncoder)}

    def _down_there(
        self,
        name: str,
        kept: KeptOnDevice,
        expert: int,
        weights: Mapping[str, Tensor],
        rounder: Rounder,
        once: Once,
    ) -> U8:
        """The payload of down alone in a format, rounded under what the source's gate and up give it."""
        encoder, fmt, w2 = self._device_encoders()[Choice(name, name)], BY_NAME[name], weights["w2"]
        damping = encoder.damping("w2")

        def moment() -> Tensor:
            seen = product(kept.seen(expert), weights["w1"], weights["w3"])
            return kept.mixed(expert, "w2", seen)

        columns = torch.ones(w2.shape[1], device=w2.device)
        own = once.one("moment of down alone", moment)
        factors = once.one(("down alone", damping), lambda: factors_of(rotated_moment(own, damping, columns)))
        (payload,) = encoder.round_downs([Down(w2, Under(columns, factors))], kept, rounder)
        check_levels(expert_name(self.layer, expert, "w2"), fmt, payload)
        return payload
