"""Makes the ends of a handoff, whichever kind was chosen for two neighbours."""

from functools import partial
from typing import NamedTuple

import torch
import zmq

from gptj_serve.config import HandoffKind
from gptj_serve.pipeline.handoff import HiddenReceiver, HiddenSender, ZmqHandoff
from gptj_serve.pipeline.slot_ring import RingReceiver, RingSender


class Site(NamedTuple):
    """What the ends of one stage are made from."""

    device: torch.device
    host: str  # this host's address that the neighbours can reach


def listen(kind: HandoffKind, link: zmq.Socket[bytes], site: Site) -> tuple[HiddenReceiver, str]:
    """The receiving end on the bound socket `link`, and what the sender must know beside that socket's address."""
    if kind == "distributed":
        from gptj_serve.pipeline.distributed_handoff import DistributedReceiver

        distributed = DistributedReceiver(link, site.host, site.device)
        return distributed, distributed.address
    if kind == "shared_memory":
        from gptj_serve.pipeline.host_slots import HostReceiverSlots

        ring = RingReceiver(HostReceiverSlots)
        return ring, ring.name
    if kind == "cuda_ipc":
        from gptj_serve.pipeline.cuda_slots import CudaReceiverSlots

        ring = RingReceiver(lambda offer, _: CudaReceiverSlots(offer, site.device))
        return ring, ring.name
    assert kind == "zmq", kind
    return ZmqHandoff(link), ""


def reach(kind: HandoffKind, link: zmq.Socket[bytes], tensors: str, site: Site) -> HiddenSender:
    """The sending end on the connected socket `link`; `tensors` is what the receiver's `listen` returned."""
    if kind == "distributed":
        from gptj_serve.pipeline.distributed_handoff import DistributedSender

        return DistributedSender(link, tensors, site.host, site.device)
    if kind == "shared_memory":
        from gptj_serve.pipeline.host_slots import HostSenderSlots

        return RingSender(tensors, HostSenderSlots)
    if kind == "cuda_ipc":
        from gptj_serve.pipeline.cuda_slots import CudaSenderSlots

        return RingSender(tensors, partial(CudaSenderSlots, device=site.device))
    assert kind == "zmq", kind
    return ZmqHandoff(link)
