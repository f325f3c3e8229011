//! Agreement on the order of registry transactions: openraft over one redb file.
