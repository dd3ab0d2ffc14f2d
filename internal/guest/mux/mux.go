// Package mux carries any number of pipes over one: where a sandbox can only be reached
// by the standard input and output of a program that its engine starts in it, that
// program is `executor-guest dial`, and each stream of the session between the two ends
// is a connection to the guest's socket. The sessions are yamux's; this package adds what
// a connection has and a yamux stream lacks, and does not trust the guest's end.
package mux

import (
	"encoding/binary"
	"io"
	"time"

	"github.com/hashicorp/yamux"
)

// Greeting is what the guest's end writes before anything else, so that it is known to be
// there: any other program that was started in its place says something else.
const Greeting = "executor-guest mux 1\n"

const (
	// window is how much of a stream is on its way at most: what a round trip of 100 ms
	// holds at 20 MB/s. Either end keeps as much for a reader that is slow.
	window = 2 << 20
	// KeepAlive is how often the guest's end asks for a sign of life. It ends when there is
	// none, and with it what it holds in the sandbox.
	KeepAlive = 30 * time.Second
	// writeTimeout bounds one write of a session: executord's side is a call that is
	// repeated for about ten seconds where the provider has trouble.
	writeTimeout = time.Minute
	// controlSize is the size of a message on the first stream of a session: the number of
	// a stream whose reader has gone, so that its writer can stop.
	controlSize = 4
)

// config is what both ends agree on.
func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.KeepAliveInterval = KeepAlive
	c.ConnectionWriteTimeout = writeTimeout
	c.MaxStreamWindowSize = window
	// A direction may stay open for as long as it likes after the other was closed.
	c.StreamCloseTimeout = 0
	c.StreamOpenTimeout = 0  // silence is noticed otherwise
	c.LogOutput = io.Discard // whoever uses the session gets the error
	return c
}

// sendGone tells the other end that nobody reads a stream any more.
func sendGone(control io.Writer, id uint32) error {
	var message [controlSize]byte
	binary.BigEndian.PutUint32(message[:], id)
	_, err := control.Write(message[:])
	return err
}

// readGone calls gone for every stream that the other end does not read any more, until
// the control stream ends.
func readGone(control io.Reader, gone func(id uint32)) {
	var message [controlSize]byte
	for {
		if _, err := io.ReadFull(control, message[:]); err != nil {
			return
		}
		gone(binary.BigEndian.Uint32(message[:]))
	}
}
