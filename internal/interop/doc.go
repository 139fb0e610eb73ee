// Package interop holds the suite that drives the built program with real mail clients from Debian. It is
// behind the build tag "interop": make interop.
package interop
