"""Moving sessions: between stores, and in from other libraries."""
