"""otloss and its peers behind one small interface, `Peer`."""

from __future__ import annotations

from benchmarks.peers import geomloss_peers, ott_peers, torch_peers
from benchmarks.peers.base import Peer, Step
from benchmarks.peers.torch_peers import OURS

PEERS: tuple[Peer, ...] = (*torch_peers.PEERS, *ott_peers.PEERS, *geomloss_peers.PEERS)

__all__ = ["OURS", "PEERS", "Peer", "Step", "by_name"]


def by_name(name: str) -> Peer:
    """The peer of that name."""
    for peer in (OURS, *PEERS):
        if peer.name == name:
            return peer
    raise ValueError(f"there is no peer {name!r}; there are: {', '.join(peer.name for peer in (OURS, *PEERS))}")
