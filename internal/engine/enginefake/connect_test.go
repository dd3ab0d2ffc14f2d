package enginefake_test

import (
	"io"
	"net"
	"testing"
	"testing/synctest"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/guestclient"
)

func TestConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Connect: func(sandbox string, port uint16) func(net.Conn) {
			if sandbox != "a" || port != 80 {
				return nil
			}
			return func(conn net.Conn) { _, _ = io.Copy(conn, conn) }
		}})
		sb := create(t, e, "a")
		for range 2 {
			conn, err := guestclient.Connect(t.Context(), sb, 80)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte("echo")); err != nil {
				t.Error(err)
			}
			got := make([]byte, 4)
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != "echo" {
				t.Errorf("%q, %v", got, err)
			}
		}
		if _, err := guestclient.Connect(t.Context(), sb, 81); guestclient.KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
			t.Error(err)
		}
	})
}
