//! Requests to stop: at any moment, on any rank, in long steps too.
