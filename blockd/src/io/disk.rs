//! The files of a page store behind one seam, so that a simulator can stand in for the device.
