"""The contract suite that every store must pass."""

from .blobs import BlobContract
from .journals import JournalContract
from .leases import LeaseContract
from .repeats import RepeatContract
from .rotation import RotationContract
from .scans import ScanContract
from .verbs import VerbContract


class StoreContract(
    VerbContract,
    RotationContract,
    RepeatContract,
    ScanContract,
    LeaseContract,
    BlobContract,
    JournalContract,
):
    """Tests each promise of ``flask_gsession.stores.base.Store``.

    Override ``open``: it returns a store with this clock. It may share its records with
    earlier ones, since every test uses keys of its own.
    """
