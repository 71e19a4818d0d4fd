//! Room for one guest after the other: a ledger of what nodes still have, which
//! every planner writes its moves into.
