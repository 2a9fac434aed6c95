//! Pure stripe geometry.
