//! The procedure `hold` of a distributed snapshot (document 003, FIG. 7) as two state machines.
