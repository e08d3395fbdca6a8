"""A module that does not import, as when a vendor's library is missing."""

import no_such_vendor_library  # noqa: F401
